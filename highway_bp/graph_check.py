"""Check where a layer's local graph ends: gradients of unknown tensors would be lost."""

import itertools
import sys
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from highway_bp.flow import is_of_chain
from highway_bp.graph_walk import edges_of, walk
from highway_bp.segment import Segment


def check_graph(
    segment: Segment, i: int, returned: Sequence[Any], ends: frozenset, made: set[int]
) -> None:
    """Check where the i-th layer's graph ends. Note in the segment what the graph contains.

    Args:
        returned: the values in what the layer returned.
        ends: nodes and edges of autograd's graph, and ids of leaves, whose gradients the chain
            returns.
        made: ids of leaves that layers have made and returned; new ones are added.

    Raises:
        RuntimeError: the gradient of a tensor that the layer uses would be lost, or its graph
            works with ``backward()`` only (re-entrant checkpointing).
    """
    begin = segment.h_in.grad_fn
    results = [segment.states[i], *segment.extras[i]]
    graph = nodes(results, ends, begin)
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph):
        raise RuntimeError(
            f"re-entrant checkpointing inside {segment.calls[i].layer.name}; expected "
            "use_reentrant=False, or Backprop()"
        )
    leaves = {node for node, behind in graph.items() if not behind and hasattr(node, "variable")}
    inner = graph.keys() - leaves
    segment.ends += [n for n in inner if _leads_out(graph[n], inner)]
    edges = itertools.chain(edges_of(results), *graph.values())
    segment.leaves |= {id(node.variable) for node in leaves}
    segment.leaves |= {e for e in edges if e[0] in ends or e in ends}
    segment.functions |= {name_of(node) for node in inner if isinstance(node, BackwardCFunction)}
    of_chain = (node for node in graph if is_of_chain(node) and not _is_of_inner(node, begin))
    lost = ["a state of the chain" for _ in of_chain]
    for node in leaves:
        known = id(node.variable) in ends or id(node.variable) in made
        if not known and _is_missed(node, returned, made):
            lost.append(f"a tensor of shape {[*node.variable.shape]}")
    if lost:
        raise RuntimeError(
            f"{segment.calls[i].layer.name} uses {lost[0]} that requires a gradient but is neither "
            "its input, a parameter of the chain nor an argument; pass it to the layer as an "
            "argument (or in a tuple, list or dictionary)"
        )


def name_of(node: BackwardCFunction) -> str:
    function = type(node)._forward_cls
    return f"{function.__module__}.{function.__qualname__}"


def _leads_out(edges: tuple, inner: Set) -> bool:
    return not edges or any(node is not None and node not in inner for node, _ in edges)


def nodes(outputs: Sequence[Tensor], ends: frozenset, begin: object = None) -> dict[object, tuple]:
    """The nodes of autograd's graph from ``outputs`` back to ``ends`` and ``begin``, without these.

    Returns:
        for each node, the edges (node, input) that it sends gradients to.
    """
    return walk(edges_of(outputs), lambda edge: edge[0] in ends or edge[0] is begin or edge in ends)


def check_computed(inner: Sequence[tuple], parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a weight of the chain is computed from another one.

    The solve would give the other weight its share, and autograd after it once more.

    Args:
        inner: edges of the weights that are no leaves, as `torch.func.functional_call` takes them.
    """
    ids, known = {id(p) for p in parameters}, set(inner)
    for node, _ in inner:
        graph = walk(node.next_functions, lambda edge: False)
        edges = itertools.chain(node.next_functions, *graph.values())
        leaves = (id(getattr(node, "variable", None)) for node in graph)
        if not known.isdisjoint(edges) or not ids.isdisjoint(leaves):
            raise RuntimeError(
                "a weight of the chain is computed from another weight of it; expected weights "
                "that do not depend on each other, or Backprop()"
            )


def _is_of_inner(node: object, begin: object) -> bool:
    """Whether a chain inside the layer has made this node, after the layer's graph has begun."""
    return node.one_pass is not begin.one_pass and node._sequence_nr() > begin._sequence_nr()


def _is_missed(node: object, returned: Sequence[Any], made: set[int]) -> bool:
    """Whether anything besides the graph holds this leaf: its gradient would be missing there.

    A layer may make leaves itself, and return them for the next layers; adds those to ``made``.
    """
    is_returned = any(node.variable is t for t in returned)
    # References: the layer's tuple, Returned.flat, extras, `Call.results`, `check_graph`.
    by_layer = 5 if is_returned else 0
    if sys.getrefcount(node.variable) > _BARE + by_layer:
        return True
    if is_returned:
        made.add(id(node.variable))
    return False


def _references_of_bare_leaf() -> int:
    node = torch.zeros(1, requires_grad=True).exp().grad_fn.next_functions[0][0]
    return sys.getrefcount(node.variable)


_BARE = _references_of_bare_leaf()
