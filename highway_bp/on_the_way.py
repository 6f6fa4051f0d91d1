"""Where autograd itself would go if some gradients alone are asked for. A chain is solved whole."""

import itertools
from collections.abc import Iterable

from torch import Tensor

from highway_bp.asked import asked_for
from highway_bp.flow import Gate, is_of_chain, is_tap
from highway_bp.graph_walk import Edge, edges_of


def is_on_the_way(t: Tensor) -> bool:
    """Whether t, a tensor inside a layer or its result there, was asked for in the backward pass in
    progress, or something behind it; if all leaves were, it is."""
    asked = asked_for()
    if not asked:
        return True
    inside = (_behind(*edge) for edge in asked if is_tap(edge[0]))  # the same results there
    asked = {*asked, *itertools.chain(*inside)}
    found, seen = edges_of([t]), set()
    while found:
        edge = found.pop()
        if edge in asked:
            return True
        place = edge if is_of_chain(edge[0]) else edge[0]
        if place not in seen:
            seen.add(place)
            found += _behind(*edge)
    return False


def _behind(node: object, i: int) -> Iterable[Edge]:
    """The edges that the i-th output of ``node`` depends on: of a chain, in the layers' graphs."""
    if is_tap(node) and node.segment is not None:
        return edges_of([[node.segment.states[node.place], *node.extras][i]])
    if isinstance(node, Gate._backward_cls):
        return [node.next_functions[i]]
    return () if node is None else node.next_functions
