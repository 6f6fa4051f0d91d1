"""One direction of one GRU layer, differentiated over all time steps at once.

    r = sigmoid(x W_ir + b_ir + h W_hr + b_hr)      z likewise
    m = h W_hn + b_hn                               n = tanh(x W_in + b_in + r m)
    h' = z h + (1 - z) n                            the carry is K = diag(z) (paper, Table 1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from highway_bp.methods import Method
from highway_bp.time_system import TimeSystem


class GRUSteps(torch.autograd.Function):
    """h_1 .. h_L (L, B, H) of x (L, B, I) and h_0 (B, H); gradients by ``method``."""

    @staticmethod
    def forward(ctx, method: Method, tile: int, x: Tensor, h_0: Tensor, *weights: Tensor) -> Tensor:
        biased = len(weights) == 4
        h, _ = torch._VF.gru(x, h_0[None], weights, biased, 1, 0.0, False, False, False)
        ctx.method, ctx.tile = method, tile
        ctx.save_for_backward(x, h_0, h, *weights)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, b: Tensor):
        x, h_0, h, *weights = ctx.saved_tensors
        parts = [
            _tile_grads(ctx.method, *(t.narrow(-2, start, min(ctx.tile, x.shape[1] - start))
                                      for t in (x, h_0, h, b)), weights)
            for start in range(0, x.shape[1], ctx.tile)
        ]
        by_row, by_weight = zip(*parts, strict=True)
        grad_x, grad_h_0 = (torch.cat(rows, -2) for rows in zip(*by_row, strict=True))
        grads = [torch.stack(g).sum(0) for g in zip(*by_weight, strict=True)]
        return None, None, grad_x, grad_h_0, *grads


def _tile_grads(method, x, h_0, h, b, weights) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Gradients of x and h_0, and of the weights, for some rows of the batch."""
    W_ih, W_hh, *biases = weights
    before = torch.cat([h_0[None], h[:-1]])  # h_0 .. h_{L-1}
    by_input, by_hidden, z = _slopes(x, before, weights)

    def vjp(w: Tensor) -> Tensor:
        return (w.unsqueeze(-2) * by_hidden).flatten(-2) @ W_hh

    L = len(x)
    w = method.solve(TimeSystem(b, z, vjp))[: L + 1]
    w_rows = w[1:].unsqueeze(-2)
    a_i = by_input.mul_(w_rows).flatten(-2)  # (L, B, 3H), cotangents of x W_ih^T + b_ih
    a_h = by_hidden.mul_(w_rows).flatten(-2)  # of h W_hh^T + b_hh
    grads = [a_i.flatten(0, 1).T @ x.flatten(0, 1), a_h.flatten(0, 1).T @ before.flatten(0, 1)]
    if biases:
        grads += [a_i.sum((0, 1)), a_h.sum((0, 1))]
    return (a_i @ W_ih, w[0]), grads


def _slopes(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dh'/da for the gates' inputs a: (L, B, 3, H) on the input's and the hidden side, and z."""
    W_ih, W_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    i_r, i_z, i_n = F.linear(x, W_ih, b_ih).chunk(3, -1)
    h_r, h_z, m = F.linear(h, W_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * m)
    to_n = (1 - z) * (1 - n * n)
    to_r = to_n * m * r * (1 - r)
    to_z = (h - n) * z * (1 - z)
    return torch.stack([to_r, to_z, to_n], -2), torch.stack([to_r, to_z, to_n * r], -2), z
