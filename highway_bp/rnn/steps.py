"""One direction of one recurrent layer as an autograd function, whatever its cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from highway_bp.first_order import first_order
from highway_bp.methods import Method
from highway_bp.rnn.windows import Windows, window_gradients


@dataclass
class Rows:
    """Some rows of the batch, as the forward pass left them.

    Attributes:
        x: inputs (L, B, I).
        start: initial states, (B, H) each.
        h: outputs (L, B, H).
        b: cotangents of the outputs (L, B, H) and of the cell's own last states (B, H) each.
        weights: of the layer and direction, in ``torch.nn``'s order.
        ends: the last step of each row (B,), None when all rows have L steps.
        wants_x, wants_start: whether anybody asks for those gradients.
    """

    x: Tensor
    start: Sequence[Tensor]
    h: Tensor
    b: Sequence[Tensor]
    weights: Sequence[Tensor]
    ends: Tensor | None
    wants_x: bool
    wants_start: bool

    @property
    def before(self) -> Tensor:
        """h_0 .. h_{L-1} (L, B, H)."""
        return torch.cat([self.start[0][None], self.h[:-1]])

    def cut(self, first: int, size: int) -> Rows:
        def rows(t: Tensor) -> Tensor:
            return t.narrow(-2, first, size)

        ends = None if self.ends is None else self.ends[first : first + size]
        return replace(
            self,
            x=rows(self.x),
            start=[*map(rows, self.start)],
            h=rows(self.h),
            b=[*map(rows, self.b)],
            ends=ends,
        )


# Gradients of x (None when not wanted), of each initial state, of each weight.
Gradients = tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]


class Cell(Protocol):
    """What `Steps` needs of a cell: the library's forward pass, and the two ways back."""

    def forward(
        self, x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], ends: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Outputs (L, B, H), then the last states that are no output (B, H) each."""

    def gradients(self, method: Method, rows: Rows) -> Gradients:
        """Every step its own layer: vector-Jacobian products in closed form."""

    def windows(self, rows: Rows, size: int, weights: Sequence[Tensor]) -> Windows:
        """Windows of ``size`` steps as layers, for `window_gradients`."""

    def initial(self, w_0: Tensor) -> list[Tensor]:
        """Gradients of the initial states (B, H) from the chain's w_0 (B, S)."""


class Steps(torch.autograd.Function):
    """Outputs and last states of ``cell``; the gradients are solved by ``method``.

    Called with (cell, method, tile, ends, number of initial states, x, *initial states,
    *weights); ``tile`` rows of the batch are differentiated at a time.
    """

    @staticmethod
    def forward(ctx, cell, method, tile, ends, n_states, x, *tensors):
        start, weights = tensors[:n_states], tensors[n_states:]
        results = cell.forward(x, start, weights, ends)
        ctx.cell, ctx.method, ctx.tile, ctx.n_states = cell, method, tile, n_states
        ctx.save_for_backward(ends, x, results[0], *tensors)
        return results if len(results) > 1 else results[0]

    @first_order
    def backward(ctx, *b):
        ends, x, h, *tensors = ctx.saved_tensors
        start, weights = tensors[: ctx.n_states], tensors[ctx.n_states :]
        wanted = ctx.needs_input_grad[5:]
        wants_x, wants_start = wanted[0], any(wanted[1 : 1 + ctx.n_states])
        rows = Rows(x, start, h, b, weights, ends, wants_x, wants_start)
        way_back, B = _way_back(ctx.cell, ctx.method, len(x)), x.shape[1]
        parts = [way_back(rows.cut(i, min(ctx.tile, B - i))) for i in range(0, B, ctx.tile)]
        by_x, by_start, by_weight = zip(*parts, strict=True)
        grad_x = torch.cat(by_x, 1) if wants_x else None
        grad_start = [torch.cat(parts) for parts in zip(*by_start, strict=True)]
        grad_weights = [torch.stack(parts).sum(0) for parts in zip(*by_weight, strict=True)]
        grads = [
            g if g is None else g.to(t.dtype)
            for g, t in zip([grad_x, *grad_start, *grad_weights], [x, *tensors], strict=True)
        ]
        return None, None, None, None, None, *grads


def _way_back(cell: Cell, method: Method, L: int) -> Callable[[Rows], Gradients]:
    size = min(method.group_size, L)

    def by_window(rows: Rows) -> Gradients:
        leaves = [t.detach().requires_grad_() for t in rows.weights]
        windows = cell.windows(rows, size, leaves)
        grad_x, w_0, by_weight = window_gradients(
            method, windows, rows.x, rows.b[0], leaves, rows.wants_x, rows.wants_start
        )
        return grad_x, cell.initial(w_0), by_weight

    def by_step(rows: Rows) -> Gradients:
        return cell.gradients(method, rows)

    return by_step if size == 1 else by_window
