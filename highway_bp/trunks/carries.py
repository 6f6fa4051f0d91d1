"""The carry of converted layers, read from the graph that autograd records of their forward pass.

Any linear map may serve as the carry, as the block is the rest of the layer. So the carry decides
how fast the gradient converges with k, never its limit.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from highway_bp.carry import Carry, Diagonal, Identity, RecordedMap
from highway_bp.flow import is_of_chain
from highway_bp.graph_walk import Edge, edges_of, walk

PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Convolution", "MkldnnConv", "Cudnn", "ScaledDot")
ACTIVATIONS = ("Relu", "LeakyRelu", "Silu", "Gelu", "Elu", "Hardswish", "Mish")
NONLINEAR = (*ACTIVATIONS, "Hard", "Tanh", "Sigmoid", "Softmax", "Max")


def recorded_carry(h: Tensor, out: Tensor) -> Callable[[Tensor, Tensor], Carry] | None:
    """carry(h_in, h_out) of a layer that has mapped h to ``out``; None for the identity.

    - ``LN(h1 + Block(h1)), h1 = LN(h + ...)`` (post-LN): diag(weight / sigma) of all its norms;
    - ``a(S h + Block(h))``, a an activation: diag(a') S, S the identity or a linear shortcut;
    - ``S h + Block(h)`` where S changes the shape: S.
    """
    node = out.grad_fn
    if node is None or h.grad_fn is None:
        return None
    if _is(node, "NativeLayerNorm") and has_residual_path(h, out):
        return lambda h_in, h_out: _through_norms(node, h)
    activated = _is(node, *ACTIVATIONS)
    if activated:
        node = node.next_functions[0][0]
    if not _is(node, "AddBackward") or not (activated or out.shape != h.shape):
        return None
    shortcut = _shortcut(node, h, out)
    if shortcut is None:
        return None

    def carry(h_in: Tensor, h_out: Tensor) -> Carry:
        slope = _slope(out, node) if activated else Identity()
        is_identity = shortcut.node is h.grad_fn
        return slope if is_identity else slope @ RecordedMap(h, shortcut)

    return carry


def _slope(out: Tensor, before: object) -> Diagonal:
    """diag(a') of the activation a, the layer's last operation."""
    edge, ones = GradientEdge(before, 0), torch.ones_like(out)
    return Diagonal(*torch.autograd.grad(out, edge, ones, retain_graph=True))


def has_residual_path(h: Tensor, out: Tensor) -> bool:
    """Whether a path leads from h to ``out`` without a matrix product or convolution.

    Products that autograd has recorded under other names (compiled ones, say) are not recognised.
    """
    begin = h.grad_fn

    def stops(edge: Edge) -> bool:
        return edge[0] is not begin and (is_of_chain(edge[0]) or _is(edge[0], *PRODUCTS))

    return begin in walk(edges_of([out]), stops)


def _through_norms(last: object, h: Tensor) -> Carry:
    width, rows, d = last._saved_normalized_shape, None, 1.0
    for node in _ancestors(last, h):  # the last one first
        if _is(node, "NativeLayerNorm") and node._saved_normalized_shape == width:
            inverse, weight = node._saved_result2, node._saved_weight  # 1 / sigma; read only once
            rows = inverse.shape if rows is None else rows
            if inverse.shape == rows:  # else the norm is of other tokens
                d = d * inverse if weight is None else d * inverse * weight.detach()
    return Diagonal(d.to(h.dtype))


def _shortcut(add: object, h: Tensor, out: Tensor) -> GradientEdge | None:
    """The branch of a sum that is h itself, or the only one that is a linear map of h."""
    edges = [GradientEdge(*edge) for edge in add.next_functions if edge[0] is not None]
    edges = [edge for edge in edges if _shape(edge) == out.shape]
    for edge in edges:
        if edge.node is h.grad_fn:
            return edge
    branches = [edge for edge in edges if _leads_to(h, edge)]
    linear = [
        edge for edge in branches if not any(_is(n, *NONLINEAR) for n in _ancestors(edge.node, h))
    ]
    return linear[0] if len(linear) == 1 < len(branches) else None


def _leads_to(h: Tensor, edge: GradientEdge) -> bool:
    parents = itertools.chain(*_ancestors(edge.node, h).values())
    return any(parent is h.grad_fn for parent, _ in parents)


def _shape(edge: GradientEdge) -> torch.Size:
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def _ancestors(node: object, h: Tensor) -> dict[object, tuple[Edge, ...]]:
    """The local graph (`walk`) from ``node`` back to its beginning at h."""
    return walk([(node, 0)], lambda edge: edge[0] is h.grad_fn or is_of_chain(edge[0]))


def _is(node: object, *kinds: str) -> bool:
    return node is not None and node.name().startswith(kinds)
