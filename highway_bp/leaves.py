"""A tensor that a layer captured, and that would silently get no gradient, is found and named."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from highway_bp.segment import Segment


def check_leaves(segments: Sequence[Segment], leaves: Sequence[Tensor]) -> None:
    """Check that the local graphs end in their input, in parameters, or in arguments.

    Raises:
        RuntimeError: a layer's graph ends in another tensor that requires a gradient.
    """
    known = {id(t) for t in leaves}
    for segment in segments:
        for name, leaf in _graph_leaves(segment):
            if id(leaf) not in known and leaf is not segment.h_in:
                raise RuntimeError(
                    f"{name} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient "
                    "but is neither a parameter of the chain nor an argument; register it as a "
                    "parameter, or pass it to the chain as an extra argument"
                )


def _graph_leaves(segment: Segment):
    seen: set = set()
    for name, state in zip(segment.names, segment.states, strict=True):
        nodes = [state.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                yield name, node.variable
            nodes.extend(parent for parent, _ in node.next_functions)
