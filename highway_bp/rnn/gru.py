"""`GRU`: ``torch.nn.GRU`` whose backward pass is solved by a gradient method.

Its step, differentiated over all time steps at once:

    r = sigmoid(x W_ir + b_ir + h W_hr + b_hr)      z likewise
    m = h W_hn + b_hn                               n = tanh(x W_in + b_in + r m)
    h' = z h + (1 - z) n                            the carry is K = diag(z) (paper, Table 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from highway_bp.methods import Method
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.steps import (
    Gradients,
    Rows,
    dtype_of_sums,
    sigmoid_slope,
    tanh_slope,
    weight_gradients,
)
from highway_bp.rnn.time_system import TimeSystem
from highway_bp.rnn.windows import Windows, at_ends, products, window_gradients


@dataclass(frozen=True)
class GRUCell:
    """``carry``: "gate" (the update gate) or "diagonal" (of the whole step's Jacobian)."""

    carry: str

    def forward(self, x, start, weights, ends) -> tuple[Tensor]:
        if x.is_cuda:
            return (_library_gru(x, start[0], weights),)
        with torch.inference_mode():  # saves a tenth of the time of the kernel's small steps
            h = _library_gru(x, start[0], weights)
        return (h.clone(),)

    def gradients(self, method: Method, rows: Rows, size: int) -> Gradients:
        rows = rows.in_dtype_of_weights()
        if size > 1:
            grad_x, w_0, by_weight = window_gradients(method, self._windows(rows, size), rows)
            return grad_x, [w_0], by_weight
        step = GRUJacobian(rows, self.carry)
        b = rows.b[0].to(step.K.dtype)
        w = method.solve(TimeSystem(b, lambda: step.K, step.vjp, bounded=step.bounded))
        w = w[: len(rows.x) + 1]
        a = step.slopes.mul_(w[1:].unsqueeze(-2))  # (L, B, 3, H), cotangents of h W_hh^T + b_hh
        biased = len(rows.weights) == 4
        by_hidden = weight_gradients(a.flatten(-2), rows.before, biased)
        torch.mul(w[1:], step.slope_n, out=a[..., 2, :])  # now of x W_ih^T + b_ih
        by_input = weight_gradients(a.flatten(-2), rows.x, biased)
        grad_x = a.flatten(-2).to(rows.x.dtype) @ rows.weights[0] if rows.wants_x else None
        by_weight = [g for pair in zip(by_input, by_hidden, strict=True) for g in pair]
        return grad_x, [w[0]], by_weight

    def _windows(self, rows: Rows, size: int) -> Windows:
        weights = [t.detach().requires_grad_() for t in rows.weights]

        def run(x: Tensor, start: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            h = _library_gru(x, start, weights)
            return h, h[-1]

        def K() -> Tensor:
            return products(GRUJacobian(rows, self.carry).K, size)

        starts, b_ends = rows.before[::size], at_ends(rows.b[0], size)
        return Windows(size, starts, b_ends, K, run, weights, bounded=self.carry == "gate")


class GRUJacobian:
    """The step's Jacobian at all times, split into block and carry.

    Attributes:
        K: the carry (L, B, H): the update gate z or, with "diagonal", the Jacobian's diagonal.
        bounded: whether |K| <= 1.
        slopes: dh'/da (L, B, 3, H) for a = h W_hh^T + b_hh, the inputs of r and z, and m.
        slope_n: dh'/da (L, B, H) for a = x W_in + b_in; for the inputs of r and z see ``slopes``.
    """

    def __init__(self, rows: Rows, carry: str):
        W_ih, W_hh, *biases = rows.weights
        H, h, dtype = rows.states.shape[-1], rows.before, dtype_of_sums(rows.x)
        b_ih, b_hn = None, None
        if biases:
            b_ih, b_hn = biases[0].clone(), biases[1][2 * H :]
            b_ih[: 2 * H].add_(biases[1][: 2 * H])
        a = F.linear(rows.x, W_ih, b_ih)  # (L, B, 3H)
        a.flatten(0, 1)[:, : 2 * H].addmm_(h.flatten(0, 1), W_hh[: 2 * H].T)
        a, m = a.to(dtype), F.linear(h, W_hh[2 * H :], b_hn).to(dtype)
        r, z, n = a.chunk(3, -1)
        a[..., : 2 * H].sigmoid_()
        n.addcmul_(r, m).tanh_()
        self.K, self.slope_n = z.clone(), 1 - z
        tanh_slope(self.slope_n, n, grad_input=self.slope_n)
        # Each gate's slope takes the gate's place in a.
        sigmoid_slope(torch.sub(h, n, out=n), z, grad_input=z)
        torch.mul(self.slope_n, r, out=n)
        sigmoid_slope(m.mul_(self.slope_n), r, grad_input=r)
        self.slopes, self._W_hh = a.unflatten(-1, (3, H)), W_hh
        self.bounded, self._own = carry == "gate", None
        if carry == "diagonal":
            W = torch.stack([W.diagonal() for W in W_hh.chunk(3)])  # (3, H)
            self._own = (self.slopes * W).sum(-2)  # K's share of the gates' path
            self.K = self.K + self._own

    def vjp(self, w: Tensor, b: Tensor, out: Tensor, steps: slice) -> None:
        """Write b + w J (n, B, H) into out, which may overlap w."""
        if self._own is not None:
            b = torch.addcmul(b, w, self._own[steps], value=-1)
        a = torch.mul(w.unsqueeze(-2), self.slopes[steps], out=self._a[: len(w)])
        a = a.flatten(0, 1).flatten(1)
        if a.dtype == self._W_hh.dtype:
            torch.addmm(b.flatten(0, 1), a, self._W_hh, out=out.flatten(0, 1))
        else:
            torch.add(b, (a.to(self._W_hh.dtype) @ self._W_hh).view_as(b), out=out)

    @cached_property
    def _a(self) -> Tensor:
        return torch.empty_like(self.slopes)  # one buffer for all iterations


def _library_gru(x: Tensor, h_0: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """h_1 .. h_L (L, B, H) by torch's own kernel (cuDNN on CUDA)."""
    h_0 = h_0[None].contiguous()  # required by cuDNN
    h, _ = torch._VF.gru(x, h_0, weights, len(weights) == 4, 1, 0.0, True, False, False)
    return h


class GRU(MethodRNN, nn.GRU):
    """Drop-in for ``torch.nn.GRU``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction form a chain over time; L is the sequence length and the
    carry is the update gate (paper, Table 1). The forward pass is torch's own. With ``Backprop()``,
    the backward pass is torch's own, too.

        >>> rnn = hb.GRU(3, 5, method=hb.Highway(k=2))
        >>> output, h_n = rnn(torch.randn(7, 2, 3))  # (L, B, input_size)
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
        >>> output.sum().backward()

    Args:
        input_size, hidden_size, ..., dtype: those of ``nn.GRU``.
        method: any gradient method whose gamma is a number, such as ``Highway(k)`` or
            ``TruncatedBPTT(window)``; ``Backprop()`` is the default. It may be set at any time and
            is used from the next forward pass on. With ``group_size=s``, windows of s steps count
            as one layer, exact inside.
        carry: "gate", or "diagonal" for the diagonal of the whole step's Jacobian.

    Raises:
        TypeError: ``method`` is not a gradient method.
        ValueError: an unknown ``carry``, or a method whose gamma is to be estimated.
    """

    cells = {carry: GRUCell(carry) for carry in ("gate", "diagonal")}  # noqa: RUF012
    n_states = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: Method | None = None,
        carry: str = "gate",
    ):
        options = bias, batch_first, dropout, bidirectional
        super().__init__(input_size, hidden_size, num_layers, *options, device=device, dtype=dtype)
        self.set_up(method, carry)
