"""`ResidualChain`: residual layers whose backward pass is solved by a gradient method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from highway_bp.cut import Cut, flattened
from highway_bp.methods import Backprop, Highway, Method
from highway_bp.module_system import ModuleSystem
from highway_bp.residual_check import warn_without_residual
from highway_bp.segment import Segment


class ResidualChain(Cut):
    """h_i = f_i(h_{i-1}), i = 1..L, with h_0 the input; gradients by ``method`` (paper, Eq. 2-3).

    The forward pass is exact whatever the method. The ``state_dict`` is that of an
    ``nn.Sequential`` of the same layers.

    A layer is any ``nn.Module`` that maps one tensor to one tensor. It may say more of itself:

    - ``carry(h_in, h_out)``: its residual path's Jacobian K, as None (identity, the default), a
      number, a tensor (the diagonal) or an object with ``vecmat(w)`` (see ``highway_bp.carry``);
    - ``with_carry(h, *args)``: forward(h) and such a K, where K needs what forward computed;
    - ``block(h, *args)`` and ``residual(h, z)`` with forward(h) = residual(h, block(h)): then the
      block's own vector-Jacobian product is used, and w K need not be subtracted.

    Args:
        layers: the layers f_1 .. f_L.
        method: ``Backprop()`` (the default, exact), ``FixedPoint(k)`` or ``Highway(k)``; the
            attribute ``method`` may be set at any time and holds from the next forward pass on.

    Raises:
        TypeError: ``method`` is not a gradient method.
    """

    def __init__(self, layers: Iterable[nn.Module], method: Method | None = None):
        super().__init__(layers)
        self._warned = False  # of missing residuals, by the first backward pass that needs them
        self.method = Backprop() if method is None else method

    @property
    def length(self) -> int:
        return len(self)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ResidualChain(list(self)[index], self.method)
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        return f"method={self.method}"

    def forward(
        self, h: Tensor, *args, return_states: bool = False, **kwargs
    ) -> Tensor | list[Tensor]:
        """Run all layers.

        Args:
            h: the input state h_0, floating, any shape.
            *args, **kwargs: passed on to every layer; gradients flow to tensors among them.
            return_states: return [h_1, ..., h_L], each of which may enter the loss.

        Returns:
            h_L, or all states.

        Raises:
            TypeError: ``h`` is not a floating tensor, or a layer returns something else.
            ValueError: the carry of a layer with ``block`` and ``residual`` is not its residual
                path's (looked at on the first pass).
            RuntimeError: a layer uses a tensor that needs a gradient and is neither a parameter
                of the chain nor an argument.
        """
        if not isinstance(h, Tensor) or not (h.is_floating_point() or h.is_complex()):
            what = str(h.dtype) if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"input state is {what}; expected a floating tensor")
        params = [p for p in self.parameters() if p.requires_grad]
        trains = h.requires_grad or params or flattened(args, kwargs)[2]
        if self.method.groups(1) is None or not torch.is_grad_enabled() or not trains:
            states = self._plain(h, args, kwargs)
        else:
            states = self.cut(h, args, kwargs, params, return_states)
        if return_states:
            return states
        return states[-1] if states else h

    def _plain(self, h: Tensor, args: tuple, kwargs: dict) -> list[Tensor]:
        states = []
        for layer in self:
            h = layer(h, *args, **kwargs)
            states.append(h)
        return states

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> list[Segment]:
        segments = []
        for group in self.method.groups(len(self)):
            segments.append(self.run_group(group, h, args, kwargs))
            h = segments[-1].h_out
        return segments

    def outputs(self, segments: Sequence[Segment], every: bool) -> list[Tensor]:
        states = [state.detach() for segment in segments for state in segment.states]
        return states if every else states[-1:]

    def system(self, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> ModuleSystem:
        rest, b = [None] * (len(self) - len(grads)) + list(grads), []
        for segment in segments:
            b.append(rest[: len(segment.states)])
            del rest[: len(segment.states)]
        system = ModuleSystem(segments, b, self.gammas)
        if not self._warned and isinstance(self.method, Highway):
            warn_without_residual(system)
            self._warned = True
        return system
