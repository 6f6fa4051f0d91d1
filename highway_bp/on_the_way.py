"""Which gradients plain autograd would compute if only some are asked for; a chain solves all."""

import itertools
from collections.abc import Iterable

from highway_bp.asked import asked_for
from highway_bp.flow import Gate, is_of_chain, is_tap
from highway_bp.graph_walk import Edge, edges_of


class Way:
    """The edges at which plain autograd would compute a gradient in the backward pass in progress.

    ``edge in way``: the tensor at this edge, or one that it was computed from, was asked for. From
    a state of a chain, the search goes on in the layer's own graph.
    """

    def __init__(self):
        asked = asked_for() or ()  # empty: all leaves
        # the same tensors in the layers' own graphs
        inside = (_parents(*edge) for edge in asked if is_tap(edge[0]))
        self._asked = {*asked, *itertools.chain(*inside)}
        self._known: dict[object, bool] = {}

    def __contains__(self, edge: Edge) -> bool:
        if not self._asked:
            return True
        found, seen, is_found = [edge], {}, False
        while found and not is_found:
            one = found.pop()
            place = one if is_of_chain(one[0]) else one[0]
            is_found = one in self._asked or self._known.get(place, False)
            if place not in seen and place not in self._known:
                seen[place] = False
                found += _parents(*one)
        self._known |= {edge: True} if is_found else seen
        return is_found


def _parents(node: object, i: int) -> Iterable[Edge]:
    """The edges that the i-th output of ``node`` depends on."""
    if is_tap(node) and (segment := node.segment) is not None:
        residual = [segment.h_in] if i == 0 and segment.is_cut else []  # not in the local graph
        return edges_of([[segment.states[node.place], *node.extras][i], *residual])
    if isinstance(node, Gate._backward_cls):
        return [node.next_functions[i]]
    return () if node is None else node.next_functions
