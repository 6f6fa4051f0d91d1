"""One direction of one recurrent layer as an autograd function, and what its cells share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from highway_bp.first_order import first_order
from highway_bp.methods import Method
from highway_bp.post_hooks import only_where_gradients_arrive
from highway_bp.surroundings import autocast


@dataclass
class Rows:
    """Some rows of the batch, with all that a cell needs for their gradients.

    Attributes:
        x: inputs (L, B, I).
        start: initial states, (B, H) each.
        states: h_0 (``start[0]``), then the outputs (L + 1, B, H).
        b: cotangents of what `Cell.forward` returned: outputs (L, B, H), last states (B, H) each.
        weights: of the layer and direction, in ``torch.nn``'s order.
        ends: the last step of each row (B,), None when all rows have L steps.
        wants_x, wants_start: whether the gradients of x and of the initial states are wanted.
    """

    x: Tensor
    start: Sequence[Tensor]
    states: Tensor
    b: Sequence[Tensor]
    weights: Sequence[Tensor]
    ends: Tensor | None
    wants_x: bool
    wants_start: bool

    @property
    def before(self) -> Tensor:
        """h_0 .. h_{L-1} (L, B, H)."""
        return self.states[:-1]

    def cut(self, first: int, size: int) -> Rows:
        return self._each(lambda t: t.narrow(-2, first, size).contiguous(), first, size)

    def in_dtype_of_weights(self) -> Rows:
        """Convert to the weights' dtype: under autocast on the CPU, x and states may differ."""
        return self._each(lambda t: t.to(self.weights[0].dtype))

    def _each(self, f, *cut: int) -> Rows:
        return replace(
            self,
            x=f(self.x),
            start=[*map(f, self.start)],
            states=f(self.states),
            b=[*map(f, self.b)],
            ends=self.ends.narrow(0, *cut) if cut and self.ends is not None else self.ends,
        )


# Gradients of x (None when not wanted), of each initial state, of each weight.
Gradients = tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor | None]]


class Cell(Protocol):
    """What `Steps` needs of a cell: its forward pass and its gradients."""

    def forward(
        self, x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], ends: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the outputs (L, B, H), then the last states that are no output, (B, H) each."""

    def gradients(self, method: Method, rows: Rows, size: int) -> Gradients:
        """Gradients with windows of ``size`` steps as layers; size 1 may use a closed form."""


class Steps(torch.autograd.Function):
    """Outputs and last states of ``cell``; the gradients are solved by ``method``.

    Called with (cell, method, tile, ends, number of initial states, x, *initial states,
    *weights); ``tile`` rows of the batch are differentiated at a time. The user may write into
    the outputs: the backward pass uses a copy of them.
    """

    @staticmethod
    def forward(ctx, cell, method, tile, ends, n_states, x, *tensors):
        start, weights = tensors[:n_states], tensors[n_states:]
        results = cell.forward(x, start, weights, ends)
        ctx.cell, ctx.method, ctx.tile, ctx.n_states = cell, method, tile, n_states
        states = torch.cat([start[0][None], results[0]])
        ctx.save_for_backward(ends, x, states, *tensors)
        return results if len(results) > 1 else results[0]

    @first_order
    def backward(ctx, *b):
        ends, x, states, *tensors = ctx.saved_tensors
        start, weights = tensors[: ctx.n_states], tensors[ctx.n_states :]
        wanted = ctx.needs_input_grad[5:]
        wants_x, wants_start = wanted[0], any(wanted[1 : 1 + ctx.n_states])
        rows = Rows(x, start, states, b, weights, ends, wants_x, wants_start)
        (L, B), tile = x.shape[:2], ctx.tile
        tiles = (rows.cut(i, min(tile, B - i)) for i in range(0, B, tile)) if tile < B else [rows]
        size = min(ctx.method.group_size, L)
        with autocast(x.device, enabled=False):
            parts = [ctx.cell.gradients(ctx.method, part, size) for part in tiles]
        by_x, by_start, by_weight = zip(*parts, strict=True)
        grad_x = _joined(by_x, 1) if wants_x else None
        grad_start = [_joined(found, 0) for found in zip(*by_start, strict=True)]
        grad_weights = [sum(found[1:], found[0]) for found in zip(*by_weight, strict=True)]
        only_where_gradients_arrive(weights, grad_weights)
        grads = [
            g if g is None else g.to(t.dtype)
            for g, t in zip([grad_x, *grad_start, *grad_weights], [x, *tensors], strict=True)
        ]
        return None, None, None, None, None, *grads


# (grad, s) -> grad * s * (1 - s) and (grad, t) -> grad * (1 - t * t): what autograd itself calls
# for s = sigmoid(a) and t = tanh(a), in one pass over memory each. (2 sigmoid(2 a) - 1 is a faster
# tanh, and loses relative precision near 0.)
sigmoid_slope = torch.ops.aten.sigmoid_backward
tanh_slope = torch.ops.aten.tanh_backward


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """float32 if x has half precision, else x's dtype; for slopes and scans, not for products."""
    return torch.promote_types(x.dtype, torch.float32)


def weight_gradients(a: Tensor, x: Tensor, biased: bool) -> list[Tensor]:
    """Gradients of W (G, I) and bias (G,) in x W^T + bias, which has cotangents a (L, B, G)."""
    W = a.flatten(0, 1).to(x.dtype).T @ x.flatten(0, 1)
    return [W, a.sum((0, 1))] if biased else [W]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
