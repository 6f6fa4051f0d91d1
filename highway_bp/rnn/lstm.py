"""`LSTM`: ``torch.nn.LSTM`` whose backward pass is solved by a gradient method.

Its step, differentiated over all time steps at once:

    i, f, o = sigmoid(a)      g = tanh(a)      a = x W_i + b_i + h W_h + b_h for each
    c' = f c + i g            h' = o tanh(c')

The state is (c, h), with cotangents (w_c, w_h). The carry is the forget gate on the cell state
(paper, Table 1). Read literally, Table 1 sends a loss on h' through a block before it reaches c.
By default the loss reaches c' in its own step: the chain's cotangents are (w_c + w_h q, w_h), where
q = o (1 - tanh(c')^2) is the derivative of h' in c'. This is a change of coordinates, in which
diag(f) is the *whole* path from c to c' and h', and the block is the path through the gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from highway_bp.methods import Method
from highway_bp.rnn.layers import TILE_BYTES, MethodRNN
from highway_bp.rnn.steps import (
    Gradients,
    Rows,
    dtype_of_sums,
    sigmoid_slope,
    tanh_slope,
    weight_gradients,
)
from highway_bp.rnn.time_system import EVERY, TimeSystem, scan_of
from highway_bp.rnn.windows import Windows, at_ends, products, window_gradients
from highway_bp.scan import in_blocks

CARRIES = ("gate", "literal", "diagonal")


@dataclass(frozen=True)
class LSTMCell:
    """``carry``: "gate" (the forget gate), "literal" (as Table 1 reads), or "diagonal"."""

    carry: str

    def forward(self, x, start, weights, ends) -> tuple[Tensor, Tensor]:
        h, _, c_n = _library_lstm(x, *start, weights)
        if ends is not None:
            before = torch.cat([start[0][None], h[:-1]])
            i, f, g, _ = _activations(x, before, weights).chunk(4, -1)
            c = cell_states(i, f, g, start[1])[1:]
            c_n = c[ends, torch.arange(len(ends), device=c.device)].to(h.dtype)
        return h, c_n

    def gradients(self, method: Method, rows: Rows, size: int) -> Gradients:
        rows = rows.in_dtype_of_weights()
        step = LSTMJacobian(rows, self.carry)
        if size > 1:
            grad_x, w_0, by_weight = window_gradients(method, _windows(step, rows, size), rows)
        else:
            b = step.cotangents(rows)
            w = method.solve(TimeSystem(b, lambda: step.K, step.vjp, bounded=step.bounded))
            w = w[: len(rows.x) + 1]  # (L + 1, B, 2H)
            a = step.gate_cotangents(*step.whole(w[1:]), out=step.slopes)  # (L, B, 4H)
            W_ih, *bias = weight_gradients(a, rows.x, len(rows.weights) == 4)
            by_hidden = weight_gradients(a, rows.before, False)
            grad_x = a.to(rows.x.dtype) @ rows.weights[0] if rows.wants_x else None
            w_0, by_weight = w[0], [W_ih, *by_hidden, *bias, *(b.clone() for b in bias)]
        w_c, w_h = w_0.chunk(2, -1)
        return grad_x, [w_h, w_c], by_weight


class LSTMJacobian:
    """The step's Jacobian at all times, split into block and carry.

    In the coordinates (c, h - q c) the cotangents are (w_c + w_h q, w_h). With "literal" they stay
    (w_c, w_h), and q below is 0. K is diag(f) on the first half of the state; with "diagonal", K is
    the Jacobian's whole diagonal in these coordinates.

    Attributes:
        K: the carry (L, B, H), or (L, B, 2H) with "diagonal".
        bounded: whether |K| <= 1.
        q: dh'/dc' = o (1 - tanh(c')^2); q_before is q of the step before, 0 at the first step.
        c_before: c_0 .. c_{L-1} (L, B, H).
        slopes: dc'/da (L, B, 4, H) for the inputs a of i, f, g; dh'/da at fixed c' for that of o.
    """

    def __init__(self, rows: Rows, carry: str):
        a = _activations(rows.x, rows.before, rows.weights)
        i, f, g, o = a.chunk(4, -1)
        c = cell_states(i, f, g, rows.start[1])
        self.c_before, tanh_c = c[:-1], torch.tanh(c[1:])
        self.q, self.K = tanh_slope(o, tanh_c), f.clone()
        slope_g = tanh_slope(i, g)
        sigmoid_slope(g, i, grad_input=i)  # each gate's slope takes the gate's place in a
        sigmoid_slope(self.c_before, f, grad_input=f)
        g.copy_(slope_g)
        sigmoid_slope(tanh_c, o, grad_input=o)
        self.slopes = slopes = a.unflatten(-1, (4, -1))
        self._W_hh, self.bounded = rows.weights[1], carry != "diagonal"
        self._literal_q, self._own = None, None
        if carry == "literal":
            self._literal_q, self.q = self.q, torch.zeros_like(self.q)
        self.q_before = torch.cat([torch.zeros_like(self.q[:1]), self.q[:-1]])
        if carry == "diagonal":
            W = torch.stack([W.diagonal() for W in self._W_hh.chunk(4)])  # (4, H)
            by_gate = slopes * W
            by_c = by_gate[..., :3, :].sum(-2) * self.q_before
            self._own = torch.cat([by_c, by_gate[..., 3, :]], -1)  # K's share of the gates' path
            self.K = torch.cat([self.K + by_c, by_gate[..., 3, :]], -1)

    def cotangents(self, rows: Rows) -> Tensor:
        """b_1 .. b_L (L, B, 2H), from losses on the outputs and on each row's last cell state."""
        b_h, b_c = rows.b[0].to(self.K.dtype), rows.b[1]
        b = torch.cat([b_h * self.q, b_h], -1)
        B, H = b_c.shape
        ends = b.new_full((B,), len(b) - 1, dtype=torch.long) if rows.ends is None else rows.ends
        b[ends, torch.arange(B, device=b.device), :H] += b_c
        return b

    def whole(self, w: Tensor, steps: slice = EVERY) -> tuple[Tensor, Tensor]:
        """Cotangents of c', its path through h' included, and of h'."""
        w_c, w_h = w.chunk(2, -1)
        if self._literal_q is not None:
            w_c = torch.addcmul(w_c, w_h, self._literal_q[steps])
        return w_c, w_h

    def gate_cotangents(
        self, w_c: Tensor, w_h: Tensor, out: Tensor, steps: slice = EVERY
    ) -> Tensor:
        """Cotangents of the gates' inputs (n, B, 4H), from the two that `whole` returns; written
        into out (n, B, 4, H), which may be the slopes."""
        slopes = self.slopes[steps]
        torch.mul(w_c.unsqueeze(-2), slopes[..., :3, :], out=out[..., :3, :])
        torch.mul(w_h, slopes[..., 3, :], out=out[..., 3, :])
        return out.flatten(-2)

    def vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        """Write b + w J (n, B, 2H) into out, which may overlap w; as many steps at a time as fit a
        CPU's cache. Ascending: the later steps' w is still the old one."""
        every, n = range(len(self.q))[steps], len(self._buffers[0])
        for i in range(0, len(every), n):
            some, part = every[i : i + n], slice(i, i + n)
            at = slice(some.start, some.stop, some.step)
            self._vjp(w[part], b[part], out[part], at)

    def _vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        if self._own is not None:
            b = torch.addcmul(b, w, self._own[steps], value=-1)
        b_c, b_h = b.chunk(2, -1)
        if self._literal_q is not None:  # the path from h' to c is in the block
            b_c = b_c + w.chunk(2, -1)[1] * self._literal_q[steps] * self.K[steps]
        a, v_h = (buffer[: len(w)] for buffer in self._buffers)
        a = self.gate_cotangents(*self.whole(w, steps), a, steps)
        if a.dtype == self._W_hh.dtype:
            torch.matmul(a, self._W_hh, out=v_h)
        else:
            v_h.copy_(a.to(self._W_hh.dtype) @ self._W_hh)
        out_c, out_h = out.chunk(2, -1)
        torch.addcmul(b_c, v_h, self.q_before[steps], out=out_c)
        torch.add(b_h, v_h, out=out_h)

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Memory for a (n, B, 4, H) and v_h (n, B, H), the same in all iterations."""
        step, L = self.slopes[0], len(self.slopes)
        size = max(step.numel() * step.itemsize, 1)
        n = L if step.is_cuda else max(1, min(L, TILE_BYTES // size))
        return self.slopes.new_empty(n, *step.shape), self.q.new_empty(n, *self.q.shape[1:])


def _windows(step: LSTMJacobian, rows: Rows, size: int) -> Windows:
    weights = [t.detach().requires_grad_() for t in rows.weights]
    q_start, q_end = step.q_before[::size], at_ends(step.q, size)  # (n, B, H)

    def run(x: Tensor, start: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        c, y = start.chunk(2, -1)  # y = h - q c: see the coordinates above
        h_start = (y + q_start[where].flatten(0, 1) * c).to(c.dtype)
        h, h_n, c_n = _library_lstm(x, h_start, c, weights)
        return h, torch.cat([c_n, (h_n - q_end[where].flatten(0, 1) * c_n).to(c_n.dtype)], -1)

    c, h = step.c_before[::size], rows.before[::size]
    starts = torch.cat([c, h - q_start * c], -1).to(rows.x.dtype)
    b_ends = at_ends(step.cotangents(rows), size)
    K = partial(products, step.K, size)
    return Windows(size, starts, b_ends, K, run, weights, bounded=step.bounded)


def _activations(x: Tensor, before: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """i, f, g, o of all steps, side by side (L, B, 4H)."""
    W_ih, W_hh, *biases = weights
    a = F.linear(x, W_ih, sum(biases) if biases else None)
    h, W = before.to(a.dtype), W_hh.to(a.dtype)  # autocast leaves an addmm_ in place alone
    a.flatten(0, 1).addmm_(h.flatten(0, 1), W.T)
    a = a.to(dtype_of_sums(x))
    H = a.shape[-1] // 4
    i_f, g, o = a.split([2 * H, H, H], -1)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return a


def cell_states(i: Tensor, f: Tensor, g: Tensor, c_0: Tensor) -> Tensor:
    """Recompute c_0 .. c_L (L + 1, B, H): torch's kernel returns the last one only."""
    blocks, size = in_blocks(L := len(i))
    c = i.new_empty(blocks * size, *c_0.shape)
    torch.index_select(i * g, 0, torch.arange(L - 1, -1, -1, device=i.device), out=c[:L])
    c[L], c[L + 1 :] = c_0, 0.0
    return scan_of(f.flip(0), 1.0, bounded=True)(c)[: L + 1].flip(0)


def _library_lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """h_1 .. h_L (L, B, H), h_L and c_L (B, H) by torch's own kernel (cuDNN on CUDA)."""
    start = h_0[None].contiguous(), c_0[None].contiguous()  # required by cuDNN
    h, h_n, c_n = torch._VF.lstm(x, start, weights, len(weights) == 4, 1, 0.0, True, False, False)
    return h, h_n[0], c_n[0]


class LSTM(MethodRNN, nn.LSTM):
    """Drop-in for ``torch.nn.LSTM``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction form a chain over time; L is the sequence length and the
    carry is the forget gate on the cell state (paper, Table 1). The forward pass is torch's own.
    With ``Backprop()``, the backward pass is torch's own, too.

    Args:
        input_size, hidden_size, ..., dtype: those of ``nn.LSTM``.
        method: see `GRU`.
        carry: "gate": a loss on h_t reaches c_t in its own step and then follows the forget
            gate; "literal": Table 1 as printed, where a loss needs one block to reach c_t;
            "diagonal": the diagonal of the whole step's Jacobian.

    Raises:
        TypeError: ``method`` is not a gradient method.
        ValueError: an unknown ``carry``; a method whose gamma is to be estimated; ``proj_size``
            with a method other than ``Backprop()``. A call of the LSTM raises it for ``lengths`` or
            a packed input together with windows of more than one step.
    """

    cells = {carry: LSTMCell(carry) for carry in CARRIES}  # noqa: RUF012
    n_states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: Method | None = None,
        carry: str = "gate",
    ):
        options = bias, batch_first, dropout, bidirectional, proj_size
        super().__init__(input_size, hidden_size, num_layers, *options, device=device, dtype=dtype)
        self.set_up(method, carry)

    def _layers(self, x: Tensor, start: list[Tensor], lengths: Tensor | None):
        if lengths is not None and self.method.group_size > 1:
            raise ValueError(
                f"lengths (or a packed input) with {self.method}; expected windows of one step: "
                "the cell states inside a window are not stored"
            )
        return super()._layers(x, start, lengths)
