"""The LSTM's step, differentiated over all time steps at once.

    i, f, o = sigmoid(a)      g = tanh(a)      a = x W_i + b_i + h W_h + b_h for each
    c' = f c + i g            h' = o tanh(c')

Its state is (c, h), cotangents (w_c, w_h). The carry is the forget gate on the cell state (paper,
Table 1). Read literally, a loss on h' goes through a block before it reaches c. Here it reaches c'
in its own step: the chain's cotangents are (w_c + w_h q, w_h) with q = o (1 - tanh(c')^2) the
derivative of h' in c', a mere change of coordinates, in which diag(f) is *all* of the way from c
to c' and h', and the block what goes through the gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from highway_bp.methods import Method
from highway_bp.rnn.gates import dtype_of_sums, sigmoid_slope, tanh_slope, weight_gradients
from highway_bp.rnn.steps import Gradients, Rows
from highway_bp.rnn.time_system import EVERY, TimeSystem
from highway_bp.rnn.windows import Windows, at_ends, products, window_gradients
from highway_bp.scan import DiagonalScan, in_blocks


@dataclass(frozen=True)
class LSTMCell:
    """``carry``: "gate" (the forget gate), "literal" (as Table 1 reads), or "diagonal"."""

    carry: str

    def forward(self, x, start, weights, ends) -> tuple[Tensor, Tensor]:
        h, _, c_n = _library_lstm(x, *start, weights)
        if ends is not None:
            before = torch.cat([start[0][None], h[:-1]])
            c = cell_states(*_activations(x, before, weights)[:3], start[1])[1:]
            c_n = c[ends, torch.arange(len(ends), device=c.device)].to(h.dtype)
        return h, c_n

    def gradients(self, method: Method, rows: Rows, size: int) -> Gradients:
        rows = rows.in_dtype_of_weights()
        step = LSTMJacobian(rows)
        split = SPLITS[self.carry](step)
        if size > 1:
            windows = self._windows(step, split, rows, size)
            grad_x, w_0, by_weight = window_gradients(method, windows, rows)
        else:
            b, bounded = _cotangents(split, rows), self.carry != "diagonal"
            w = method.solve(TimeSystem(b, lambda: split.K, split.vjp, bounded=bounded))
            w = w[: len(rows.x) + 1]  # (L + 1, B, 2H)
            a = step.gate_cotangents(*split.whole(w[1:]))  # (L, B, 4H)
            by_input = weight_gradients(a, rows.x, len(rows.weights) == 4)
            by_hidden = weight_gradients(a, rows.before, False)
            grad_x = a.to(rows.x.dtype) @ rows.weights[0] if rows.wants_x else None
            W, *bias = by_input
            w_0, by_weight = w[0], [W, *by_hidden, *bias, *bias]
        w_c, w_h = w_0.chunk(2, -1)
        return grad_x, [w_h, w_c], by_weight

    def _windows(self, step: LSTMJacobian, split: GateSplit, rows: Rows, size: int) -> Windows:
        weights = [t.detach().requires_grad_() for t in rows.weights]
        q_start, q_end = split.q_before[::size], at_ends(split.q, size)  # (n, B, H)

        def run(x: Tensor, start: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            c, y = start.chunk(2, -1)  # y = h - q c: see the coordinates above
            h_start = (y + q_start[where].flatten(0, 1) * c).to(c.dtype)
            h, h_n, c_n = _library_lstm(x, h_start, c, weights)
            return h, torch.cat([c_n, (h_n - q_end[where].flatten(0, 1) * c_n).to(c_n.dtype)], -1)

        c, h = step.c_before[::size], rows.before[::size]
        starts = torch.cat([c, h - q_start * c], -1).to(rows.x.dtype)
        b_ends = at_ends(_cotangents(split, rows), size)
        return Windows(size, starts, b_ends, lambda: products(split.K, size), run, weights)


class LSTMJacobian:
    """The step's Jacobian at all times.

    Attributes:
        f: forget gate (L, B, H).
        q: dh'/dc' = o (1 - tanh(c')^2), and q_before that of the step before, 0 at the first.
        c_before: c_0 .. c_{L-1} (L, B, H).
        slopes: of c' in the inputs of i, f, g, and of h' at fixed c' in that of o (L, B, 4, H).
    """

    def __init__(self, rows: Rows):
        i, self.f, g, o = _activations(rows.x, rows.before, rows.weights)
        c = cell_states(i, self.f, g, rows.start[1])
        self.c_before, tanh_c = c[:-1], torch.tanh(c[1:])
        self.q = tanh_slope(o, tanh_c)
        self.q_before = torch.cat([torch.zeros_like(self.q[:1]), self.q[:-1]])
        self.slopes = slopes = i.new_empty(*i.shape[:2], 4, i.shape[-1])
        sigmoid_slope(g, i, grad_input=slopes[..., 0, :])
        sigmoid_slope(self.c_before, self.f, grad_input=slopes[..., 1, :])
        tanh_slope(i, g, grad_input=slopes[..., 2, :])
        sigmoid_slope(tanh_c, o, grad_input=slopes[..., 3, :])
        self._W_hh = rows.weights[1]

    def gate_cotangents(self, c: Tensor, h: Tensor, steps: slice = EVERY) -> Tensor:
        """Of the gates' inputs (n, B, 4H), from those of c' (all of its ways) and of h'."""
        slopes = self.slopes[steps]
        a = slopes.new_empty(slopes.shape)
        torch.mul(c.unsqueeze(-2), slopes[..., :3, :], out=a[..., :3, :])
        torch.mul(h, slopes[..., 3, :], out=a[..., 3, :])
        return a.flatten(-2)

    def through_gates(self, c: Tensor, h: Tensor, steps: slice) -> Tensor:
        """Cotangents of the h before (n, B, H), from those of c' (all of its ways) and of h'."""
        return (self.gate_cotangents(c, h, steps).to(self._W_hh.dtype) @ self._W_hh).to(c.dtype)

    def own(self) -> tuple[Tensor, Tensor]:
        """Diagonals of dc'/dh, and of dh'/dh at fixed c' (L, B, H)."""
        W = torch.stack([W.diagonal() for W in self._W_hh.chunk(4)])  # (4, H)
        by_gate = self.slopes * W
        return by_gate[..., :3, :].sum(-2), by_gate[..., 3, :]


class GateSplit:
    """Coordinates (c, h - q c): cotangents (w_c + w_h q, w_h), in which K is diag(f) on the first
    half and J the way through the gates."""

    def __init__(self, step: LSTMJacobian):
        self.step, self.q, self.q_before = step, step.q, step.q_before
        self.K = step.f

    def cotangents(self, b_h: Tensor) -> Tensor:
        """(L, B, 2H) from the outputs' (L, B, H)."""
        return torch.cat([b_h * self.q, b_h], -1)

    def whole(self, w: Tensor, steps: slice = EVERY) -> tuple[Tensor, Tensor]:
        """Cotangents of c', all of its ways included, and of h'."""
        return w.chunk(2, -1)

    def vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        v_h = self.step.through_gates(*self.whole(w, steps), steps)
        b_c, b_h, out_c, out_h = *b.chunk(2, -1), *out.chunk(2, -1)
        torch.addcmul(b_c, v_h, self.q_before[steps], out=out_c)
        torch.add(b_h, v_h, out=out_h)


class DiagonalSplit(GateSplit):
    """The same coordinates, K the whole diagonal of the step's Jacobian in them."""

    def __init__(self, step: LSTMJacobian):
        super().__init__(step)
        by_c, by_o = step.own()
        self._through_gates = torch.cat([by_c * step.q_before, by_o], -1)  # the part within J
        self.K = torch.cat([step.f + by_c * step.q_before, by_o], -1)

    def vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        within = self._through_gates[steps]
        super().vjp(w, torch.addcmul(b, w, within, value=-1), out, steps)


class LiteralSplit(GateSplit):
    """Coordinates (c, h): K is diag(f) on c, and h' reaches c through the block alone."""

    def __init__(self, step: LSTMJacobian):
        super().__init__(step)
        self.q = self.q_before = torch.zeros_like(step.q)

    def whole(self, w: Tensor, steps: slice = EVERY) -> tuple[Tensor, Tensor]:
        w_c, w_h = w.chunk(2, -1)
        return torch.addcmul(w_c, w_h, self.step.q[steps]), w_h

    def vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        v_h = self.step.through_gates(*self.whole(w, steps), steps)
        v_c = w.chunk(2, -1)[1] * self.step.q[steps] * self.step.f[steps]
        torch.add(b, torch.cat([v_c, v_h], -1), out=out)


SPLITS = {"gate": GateSplit, "literal": LiteralSplit, "diagonal": DiagonalSplit}


def _cotangents(split: GateSplit, rows: Rows) -> Tensor:
    """b_1 .. b_L (L, B, 2H): of the outputs, and of each row's last cell state."""
    b_h, b_c = rows.b
    b = split.cotangents(b_h.to(split.K.dtype))
    B, H = b_c.shape
    ends = b.new_full((B,), len(b) - 1, dtype=torch.long) if rows.ends is None else rows.ends
    b[ends, torch.arange(B, device=b.device), :H] += b_c
    return b


def _activations(x: Tensor, before: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """i, f, g, o (L, B, H) of all steps."""
    W_ih, W_hh, *biases = weights
    a = F.linear(x, W_ih, sum(biases) if biases else None).to(dtype_of_sums(x))
    a += F.linear(before, W_hh)
    i, f, g, o = a.chunk(4, -1)
    return [i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()]


def cell_states(i: Tensor, f: Tensor, g: Tensor, c_0: Tensor) -> Tensor:
    """c_0 .. c_L (L + 1, B, H): the library's forward pass keeps the last one alone."""
    blocks, size = in_blocks(L := len(i))
    c = i.new_zeros(blocks * size, *c_0.shape)
    torch.mul(i.flip(0), g.flip(0), out=c[:L])
    c[L] = c_0
    return DiagonalScan(f.flip(0), bounded=True)(c)[: L + 1].flip(0)


def _library_lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """h_1 .. h_L (L, B, H), h_L and c_L (B, H) by torch's own kernel (cuDNN on CUDA)."""
    h, h_n, c_n = torch._VF.lstm(
        x,
        (h_0[None].contiguous(), c_0[None].contiguous()),  # cuDNN asks for it
        weights,
        len(weights) == 4,
        1,
        0.0,
        True,
        False,
        False,
    )
    return h, h_n[0], c_n[0]
