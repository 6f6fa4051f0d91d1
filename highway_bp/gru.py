"""`GRU`: ``torch.nn.GRU`` whose backward pass is solved by a gradient method."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from highway_bp.gru_steps import GRUSteps
from highway_bp.methods import Backprop, Method

TILE_BYTES = 2**21  # of one state tensor (L, tile, H): its few companions then fit a CPU's cache


class GRU(nn.GRU):
    """Drop-in for ``torch.nn.GRU``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction are a chain over time, L the sequence length; its carry
    is the update gate (paper, Table 1). With ``Backprop()`` it is ``nn.GRU`` itself.

    Args:
        *args, **kwargs: those of ``nn.GRU``.
        method: ``Backprop()`` (the default), ``FixedPoint(k)`` or ``Highway(k)``; may be set at
            any time and holds from the next forward pass on.

    Raises:
        TypeError: ``method`` is not a gradient method.
        ValueError: ``method`` has a ``group_size`` other than 1.
    """

    def __init__(self, *args, method: Method | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.method = Backprop() if method is None else method

    @property
    def method(self) -> Method:
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        if not isinstance(method, Method) or isinstance(method, type):
            raise TypeError(
                f"method={method!r}; expected a gradient method such as Backprop(), "
                "FixedPoint(k) or Highway(k)"
            )
        if getattr(method, "group_size", 1) != 1:
            raise ValueError(f"method={method!r}; a GRU takes group_size=1 so far")
        self._method = method

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``nn.GRU.forward``: output (L, B, D*H) and h_n (D*num_layers, B, H), D directions.

        Raises:
            TypeError: a ``PackedSequence`` with a method other than ``Backprop()``.
            ValueError, RuntimeError: what ``nn.GRU`` raises for inputs that do not fit.
        """
        if not torch.is_grad_enabled() or isinstance(self.method, Backprop):
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            raise TypeError(f"input is a PackedSequence; with {self.method} only tensors so far")
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        unbatched = input.dim() == 2
        batch_dim = 1 if unbatched or not self.batch_first else 0
        x = input.unsqueeze(1) if unbatched else input.movedim(batch_dim, 1)
        x = x.to(self.weight_ih_l0.dtype) if torch.is_autocast_enabled(x.device.type) else x
        if hx is None:
            directions = 1 + self.bidirectional
            hx = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
        elif unbatched:
            if hx.dim() != 2:
                raise RuntimeError(
                    f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor"
                )
            hx = hx.unsqueeze(1)
        self.check_forward_args(x if not self.batch_first else x.transpose(0, 1), hx, None)
        output, h_n = self._layers(x, hx.to(x.dtype))
        if unbatched:
            return output.squeeze(1), h_n.squeeze(1)
        return output.movedim(1, batch_dim), h_n

    def _layers(self, x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        h_0, h_n = iter(hx), []
        for layer in range(self.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            forward = self._direction(x, next(h_0), f"_l{layer}")
            h_n.append(forward[-1])
            if not self.bidirectional:
                x = forward
                continue
            backward = self._direction(x.flip(0), next(h_0), f"_l{layer}_reverse")
            h_n.append(backward[-1])
            x = torch.cat([forward, backward.flip(0)], -1)
        return x, torch.stack(h_n)

    def _direction(self, x: Tensor, h_0: Tensor, suffix: str) -> Tensor:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        weights = [getattr(self, name + suffix) for name in names]
        L, B = x.shape[:2]
        row = max(L * self.hidden_size * x.element_size(), 1)
        tile = B if x.is_cuda else max(1, min(B, TILE_BYTES // row))
        with torch.autocast(x.device.type, enabled=False):
            return GRUSteps.apply(self.method, tile, x, h_0, *weights)
