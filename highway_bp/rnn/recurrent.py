"""`Recurrent`: a user's own cell over time, its backward pass solved by a gradient method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from highway_bp.first_order import first_order
from highway_bp.has_method import HasMethod, Watched
from highway_bp.methods import Backprop, Method, check_fixed_gamma
from highway_bp.rnn.windows import Windows, at_ends, products, window_gradients

State = Tensor | tuple[Tensor, ...]


class Recurrent(HasMethod, nn.Module):
    """s_t = cell(x_t, s_{t-1}) for t = 1 .. L, differentiated over all time steps at once.

    The steps of the backward pass run as rows of one batch of L * B, so the cell must treat rows
    independently, and must use no tensors that need a gradient other than its parameters.

    Args:
        cell: module ``cell(x_t, state) -> state``; x_t is (B, I), a state a tensor (B, S) or a
            tuple of such. It may have ``initial_state(B)``, used when no state is given, and
            ``output(state)``, what is returned instead of the states: a loss on an output then
            reaches all of its state's parts in their own step.
        carry: ``carry(x, before, after)``: the diagonal of the residual path's Jacobian
            ds_t/ds_{t-1} for x_t, s_{t-1}, s_t, in a state's form; None stands for a part without
            carry. By default the cell's own method ``carry``.
        method: as of `GRU`.

    Raises:
        TypeError: ``method`` is not a gradient method, or there is no carry.
    """

    def __init__(
        self,
        cell: nn.Module,
        carry: Callable[[Tensor, State, State], object] | None = None,
        method: Method | None = None,
    ):
        super().__init__()
        self.cell = cell
        self.length = 0  # steps of the last input
        self.iterations: list[int] = []  # taken by the last backward pass
        self._carry = carry or getattr(cell, "carry", None)
        if not callable(self._carry):
            raise TypeError(
                f"carry of {type(cell).__name__} is {self._carry!r}; expected a function "
                "carry(x, before, after), or a cell with such a method"
            )
        self.method = Backprop() if method is None else method

    def check_method(self, method: Method) -> None:
        super().check_method(method)
        check_fixed_gamma(method)

    def extra_repr(self) -> str:
        return f"method={self.method}"

    def forward(self, x: Tensor, state: State | None = None) -> tuple[State, State]:
        """Outputs (or states) of all steps (L, B, ...) for x (L, B, I), and the last state.

        Raises:
            ValueError: x is not (L, B, I) with L >= 1; a state or carry of the wrong shape.
            TypeError: no state is given and the cell has no ``initial_state``.
        """
        if x.dim() != 3 or len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (L, B, I) with L >= 1")
        self.length = len(x)
        given = self._start(x) if state is None else state
        parts = _parts(given)
        for part in parts:
            if part.dim() != 2 or len(part) != x.shape[1]:
                raise ValueError(
                    f"a state has shape {tuple(part.shape)}; expected ({x.shape[1]}, ...), "
                    "a row for each sequence"
                )
        layout = _Layout(isinstance(given, tuple), [part.shape[-1] for part in parts])
        start = torch.cat(parts, -1)
        if not torch.is_grad_enabled() or self.method.group_size is None:
            states = _run(self.cell, layout, x, start)
        else:
            params = [p for p in self.cell.parameters() if p.requires_grad]
            with torch.autocast(x.device.type, enabled=False):
                method = Watched(self.method, self)
            states = _Solved.apply(self, method, layout, x, start, *params)
        every = layout.state(states)
        output = getattr(self.cell, "output", None)
        return (every if output is None else output(every)), layout.state(states[-1])

    def _start(self, x: Tensor) -> State:
        initial = getattr(self.cell, "initial_state", None)
        if initial is None:
            raise TypeError(
                f"no state is given and {type(self.cell).__name__} has no initial_state(B)"
            )
        return initial(x.shape[1])

    def diagonal(self, layout: _Layout, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The carry at all steps (L, B, S); x (L, B, I), states (L, B, S)."""
        rows = [layout.state(t.flatten(0, 1)) for t in (before, after)]
        with torch.no_grad():
            carry = _parts(self._carry(x.flatten(0, 1), *rows))
        L, B = x.shape[:2]
        if len(carry) != len(layout.sizes):
            raise ValueError(
                f"carry of {type(self.cell).__name__} has {len(carry)} parts; expected "
                f"{len(layout.sizes)}, one for each part of the state"
            )
        return torch.cat(
            [
                self._part(d, before, (L * B, size))
                for d, size in zip(carry, layout.sizes, strict=True)
            ],
            -1,
        ).unflatten(0, (L, B))

    def _part(self, d: object, like: Tensor, shape: tuple[int, int]) -> Tensor:
        d = torch.as_tensor(0.0 if d is None else d, dtype=like.dtype, device=like.device)
        try:
            return d.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"carry of {type(self.cell).__name__} has shape {tuple(d.shape)}; expected a "
                f"diagonal that broadcasts to a state of shape {shape}, rows of all steps"
            ) from None


class _Layout:
    """A state's parts side by side in one tensor (..., S)."""

    def __init__(self, is_tuple: bool, sizes: list[int]):
        self.is_tuple, self.sizes = is_tuple, sizes

    def state(self, s: Tensor) -> State:
        parts = s.split(self.sizes, -1)
        return parts if self.is_tuple else parts[0]


class _Solved(torch.autograd.Function):
    """States s_1 .. s_L (L, B, S) of x and s_0; gradients by ``method``."""

    @staticmethod
    def forward(ctx, recurrent, method, layout, x, start, *params):
        states = _run(recurrent.cell, layout, x, start)
        ctx.recurrent, ctx.method, ctx.layout = recurrent, method, layout
        ctx.save_for_backward(x, start, states, *params)
        return states

    @first_order
    def backward(ctx, b):
        x, start, states, *params = ctx.saved_tensors
        cell, layout = ctx.recurrent.cell, ctx.layout
        before = torch.cat([start[None], states[:-1]])
        size = min(ctx.method.group_size, len(x))

        def run(x: Tensor, start: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            inside = _run(cell, layout, x, start)
            return inside, inside[-1]

        def K() -> Tensor:
            return products(ctx.recurrent.diagonal(layout, x, before, states), size)

        windows = Windows(size, before[::size], at_ends(b, size), K, run)
        grad_x, grad_start, grads = window_gradients(
            ctx.method, windows, x, b, params, *ctx.needs_input_grad[3:5]
        )
        return None, None, None, grad_x, grad_start, *grads


def _run(cell: nn.Module, layout: _Layout, x: Tensor, start: Tensor) -> Tensor:
    """s_1 .. s_L (L, B, S), one step after another."""
    states, s = [], start
    for x_t in x:
        s = torch.cat(_parts(cell(x_t, layout.state(s))), -1)
        states.append(s)
    return torch.stack(states)


def _parts(state: object) -> Sequence:
    return list(state) if isinstance(state, tuple) else [state]
