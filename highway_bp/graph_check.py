"""Check where a layer's local graph ends: gradients of unknown tensors would be lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from highway_bp.flow import is_of_chain
from highway_bp.segment import Segment


def check_graph(segment: Segment, i: int, ends: frozenset, made: set[int]) -> None:
    """Check where the i-th layer's graph ends, and add its last nodes to ``segment.ends``.

    Args:
        ends: nodes of autograd's graph, and ids of leaves, whose gradients the chain returns.
        made: ids of leaves that layers have made and returned; new ones are added.

    Raises:
        RuntimeError: the gradient of a tensor that the layer uses would be lost, or its graph
            works with ``backward()`` only (re-entrant checkpointing).
    """
    begin = segment.h_in.grad_fn
    graph = nodes([segment.states[i], *segment.extras[i]], ends, begin)
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph):
        raise RuntimeError(
            f"re-entrant checkpointing inside {segment.calls[i].layer.name}; expected "
            "use_reentrant=False, or Backprop()"
        )
    leaves = {node for node, behind in graph.items() if not behind and hasattr(node, "variable")}
    inner = graph.keys() - leaves
    segment.ends += [node for node in inner if inner.isdisjoint(graph[node])]
    of_chain = (node for node in graph if is_of_chain(node) and not _is_of_inner(node, begin))
    lost = ["a state of the chain" for _ in of_chain]
    for node in leaves:
        known = id(node.variable) in ends or id(node.variable) in made
        if not known and _is_missed(node, segment.extras[i], made):
            lost.append(f"a tensor of shape {[*node.variable.shape]}")
    if lost:
        raise RuntimeError(
            f"{segment.calls[i].layer.name} uses {lost[0]} that requires a gradient but is neither "
            "its input, a parameter of the chain nor an argument; pass it to the layer as an "
            "argument (or in a tuple, list or dictionary)"
        )


def nodes(outputs: Sequence[Tensor], ends: frozenset, begin: object = None) -> dict[object, list]:
    """The nodes of autograd's graph from ``outputs`` back to ``ends`` and ``begin``, without these.

    Returns:
        for each node, the nodes that it sends gradients to.
    """
    graph: dict[object, list] = {}
    found = [t.grad_fn for t in outputs if t.requires_grad]
    while found:
        node = found.pop()
        if node not in graph and node not in ends and node is not begin and node is not None:
            graph[node] = behind = [parent for parent, _ in node.next_functions]
            found += behind
    return graph


def _is_of_inner(node: object, begin: object) -> bool:
    """Whether a chain inside the layer has made this node, after the layer's graph has begun."""
    return node.one_pass is not begin.one_pass and node._sequence_nr() > begin._sequence_nr()


def _is_missed(node: object, extras: Sequence[Tensor], made: set[int]) -> bool:
    """Whether anything besides the graph holds this leaf: its gradient would be missing there.

    A layer may make leaves itself, and return them for the next layers; adds those to ``made``.
    """
    is_returned = any(node.variable is t for t in extras)
    by_layer = 4 if is_returned else 0  # references held by its tuple and by our three lists
    if sys.getrefcount(node.variable) > _BARE + by_layer:
        return True
    if is_returned:
        made.add(id(node.variable))
    return False


def _references_of_bare_leaf() -> int:
    node = torch.zeros(1, requires_grad=True).exp().grad_fn.next_functions[0][0]
    return sys.getrefcount(node.variable)


_BARE = _references_of_bare_leaf()
