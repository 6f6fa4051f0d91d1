"""`Recurrent`: a user's own cell over time, with its backward pass solved by a gradient method."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from highway_bp.first_order import refuse_transforms
from highway_bp.has_method import CountedMethod, HasMethod
from highway_bp.methods import Backprop, Method, check_fixed_gamma
from highway_bp.rnn.steps import Steps
from highway_bp.rnn.user_cell import Layout, RowsOfSteps, State, run_cell, tensors_of


class Recurrent(HasMethod, nn.Module):
    """s_t = cell(x_t, s_{t-1}) for t = 1 .. L, differentiated over all time steps at once.

    The backward pass runs the cell on all steps as rows of one batch of L * B. So the cell must
    treat rows independently (no batch normalisation in training), draw no random numbers (no
    dropout), and use no tensors that need a gradient other than its parameters. Other cells are
    refused where that is noticed (docs/method.md, Limits); ``Backprop()`` takes any.

    Args:
        cell: module ``cell(x_t, state) -> state``; x_t is (B, I), a state is a tensor (B, S) or a
            tuple of such tensors. Two methods are optional: ``initial_state(B)`` is used when no
            state is given; ``output(state)`` is returned instead of the states, and a loss on an
            output then reaches all parts of its state in their own step.
        carry: ``carry(x, before, after)`` returns the diagonal of the residual path's Jacobian
            ds_t/ds_{t-1} for x_t, s_{t-1}, s_t, in the form of a state, with None for a part
            without carry. Default: the cell's own method ``carry``.
        method: see `GRU`.

    Raises:
        TypeError: ``method`` is not a gradient method, or there is no carry.
        ValueError: a method whose gamma is to be estimated.
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
        self._given_carry = carry
        self._carry()  # raises TypeError
        self.method = Backprop() if method is None else method

    def _carry(self) -> Callable:
        carry = self._given_carry or getattr(self.cell, "carry", None)
        if not callable(carry):
            raise TypeError(
                f"carry of {type(self.cell).__name__} is {carry!r}; expected a function "
                "carry(x, before, after), or a cell with such a method"
            )
        return carry

    def check_method(self, method: Method) -> None:
        super().check_method(method)
        check_fixed_gamma(method)

    def extra_repr(self) -> str:
        return f"method={self.method}"

    def forward(self, x: Tensor, state: State | None = None) -> tuple[State, State]:
        """Outputs (or states) of all steps (L, B, ...) for x (L, B, I), and the last state.

        Raises:
            ValueError: x is not (L, B, I) with L >= 1; a state or carry of the wrong shape.
            TypeError: no state is given and the cell has no ``initial_state``; a state is neither
                a tensor nor a tuple of tensors.
            RuntimeError: the cell draws random numbers; the call is in a ``torch.func`` transform;
                in the backward pass, the cell mixes rows or fails on rows of all steps, writes into
                its state, uses other tensors that need gradients, or has functions that cannot run
                twice; a loss uses tensors that it keeps; the pass is in inference mode.
        """
        if x.dim() != 3 or len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (L, B, I) with L >= 1")
        self.length = len(x)
        given = self._start(x) if state is None else state
        parts = tensors_of(given, "state")
        for part in parts:
            if part.dim() != 2 or len(part) != x.shape[1]:
                raise ValueError(
                    f"a state has shape {tuple(part.shape)}; expected ({x.shape[1]}, ...), "
                    "a row for each sequence"
                )
        layout = Layout(isinstance(given, tuple), [part.shape[-1] for part in parts])
        start = torch.cat(parts, -1)
        if not torch.is_grad_enabled() or self.method.group_size is None:
            states = run_cell(self.cell, layout, x, start)
        else:
            refuse_transforms(type(self.cell).__name__)
            states = self._forward_by_method(layout, x, start)
        every = layout.state(states.view_as(states))  # hooks on it do not see the last state's loss
        output = getattr(self.cell, "output", None)
        last = layout.state(states[-1])  # copies: views could not be detached in place
        last = tuple(map(torch.clone, last)) if layout.is_tuple else last.clone()
        return (every if output is None else output(every)), last

    def _start(self, x: Tensor) -> State:
        initial = getattr(self.cell, "initial_state", None)
        if initial is None:
            raise TypeError(
                f"no state is given and {type(self.cell).__name__} has no initial_state(B)"
            )
        return initial(x.shape[1])

    @torch.compiler.disable  # the cell runs once a step
    def _forward_by_method(self, layout: Layout, x: Tensor, start: Tensor) -> Tensor:
        params = {n: p for n, p in self.cell.named_parameters() if p.requires_grad}
        cell = RowsOfSteps(self.cell, list(params), self._carry(), layout, x.device)
        method = CountedMethod(self.method, self)
        return Steps.apply(cell, method, x.shape[1], None, 1, x, start, *params.values())
