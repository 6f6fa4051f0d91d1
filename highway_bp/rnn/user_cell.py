"""A user's cell as `Recurrent` differentiates it: all steps as rows of one batch."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils.stateless import _reparametrize_module  # of torch.func.functional_call

from highway_bp.flow import Refused
from highway_bp.graph_check import nodes
from highway_bp.layer_checks import has_nonzero, is_linear, probe, refuse_unrepeatable
from highway_bp.methods import Method
from highway_bp.own_gradients import refuse_own_gradients
from highway_bp.rnn.steps import Gradients, Rows
from highway_bp.rnn.windows import Windows, at_ends, products, window_gradients
from highway_bp.segment import gradients
from highway_bp.silenced import silenced
from highway_bp.surroundings import (
    autocast,
    kept_buffers,
    random_state,
    settings_of,
    with_settings,
)

State = Tensor | tuple[Tensor, ...]


class Layout:
    """A state's parts side by side in one tensor (..., S)."""

    def __init__(self, is_tuple: bool, sizes: list[int]):
        self.is_tuple, self.sizes = is_tuple, sizes

    def state(self, s: Tensor) -> State:
        return s.split(self.sizes, -1) if self.is_tuple else s


class RowsOfSteps:
    """A user's cell as a `steps.Cell`, for one forward pass; states (L, B, S) as in `Layout`.

    names: of the parameters that require a gradient.
    """

    def __init__(
        self,
        cell: nn.Module,
        names: Sequence[str],
        carry: Callable,
        layout: Layout,
        device: torch.device,
    ):
        self.module, self.names, self.carry, self.layout = cell, names, carry, layout
        self.settings = settings_of(cell)
        self.name, self.autocast = type(cell).__name__, autocast(device)
        kind = device.type
        self.is_mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

    def forward(self, x, start, weights, ends) -> tuple[Tensor]:
        before = random_state(x.device)
        states = self._forward_states(x, start[0], weights)
        after = random_state(x.device)
        if any(a is not None and not a.equal(b) for a, b in zip(before, after, strict=True)):
            raise RuntimeError(
                f"{self.name} draws random numbers (dropout?), and its backward pass would draw "
                "other ones; expected a cell without them, or Backprop()"
            )
        return (states,)

    def _forward_states(self, x: Tensor, s: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """As `run_cell`, with a graph for each step that only serves to refuse: if a loss uses a
        tensor that the cell keeps, `Refused` gets its gradient by the step's input or state."""
        states = []
        line = (
            f"a loss (or a gradient taken inside) uses a tensor that {self.name} keeps, or that a "
            "hook inside it shows; expected a loss on its states or outputs, or Backprop()"
        )
        with torch.enable_grad():
            inside, mark = Refused.apply(line, lambda: False, 2, x, s[:, :0], *weights)
            # mark has no columns: joined to a state, it makes the state lead to `Refused`.
            wanted = s.requires_grad  # cells may read it of their state
            for x_t in inside if x.requires_grad else x:
                given = torch.cat([s.detach(), mark.to(s.dtype)], -1) if wanted else s
                s = _step(self.module, self.layout, x_t, given)
                wanted = s.requires_grad
                if wanted and not mark.requires_grad:
                    self._refuse_foreign("a tensor")
                s = s.detach()
                states.append(s)
        return torch.stack(states)

    def gradients(self, method: Method, rows: Rows, size: int) -> Gradients:
        starts, ends = rows.before[::size], at_ends(rows.states[1:], size)
        weights, own_weights = self._weights(rows)

        def run(x: Tensor, start: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            with self.autocast:
                inside = self._run_rows(x, start)
            self._check(inside, ends[where].flatten(0, 1), [x, start, *weights])
            if has_nonzero(start.detach() - starts[where].flatten(0, 1)):
                raise RuntimeError(
                    f"{self.name} writes into the state that it gets; expected a copy, or "
                    "Backprop()"
                )
            known = [t for t in (start, x, *weights) if t.requires_grad]
            if any(isinstance(node, BackwardCFunction) for node in nodes([inside], frozenset())):
                self._check_functions(inside, known, size)
                self._check_rows(inside, x, start, rows.x.shape[1])
            return inside, inside[-1]

        def K() -> Tensor:
            return products(self.diagonal(rows.x, rows.before, rows.states[1:]), size)

        b_ends = at_ends(rows.b[0], size)
        windows = Windows(size, starts.clone(), b_ends, K, run, weights)
        hooks = (p._backward_hooks for p in weights)
        # Hooks run when these gradients leave the chain.
        with (
            refuse_own_gradients([self]),
            silenced(hooks),
            _kept(self.module),
            with_settings(self.settings),
            own_weights,
        ):
            grad_x, w_0, by_weight = window_gradients(method, windows, rows)
        return grad_x, [w_0], by_weight

    def _weights(self, rows: Rows) -> tuple[list[Tensor], AbstractContextManager]:
        """The weights of the forward pass as leaves, and a context in which the cell has them.

        The cell may have others now: `torch.func.functional_call` gave them, a checkpoint gives
        copies, or they were frozen since.
        """
        now = dict(self.module.named_parameters())
        pairs = list(zip(self.names, rows.weights, strict=True))
        if all(w is now.get(name) and w.requires_grad for name, w in pairs):
            return [*rows.weights], contextlib.nullcontext()
        copies = {name: w.detach().requires_grad_() for name, w in pairs}
        return [*copies.values()], _reparametrize_module(self.module, copies, tie_weights=True)

    def _check(self, inside: Tensor, end: Tensor, known: list[Tensor]) -> None:
        """Raise RuntimeError if the gradient would be wrong: the cell gives other states when run
        again, or uses a tensor whose gradient would be lost."""
        now = inside[-1].detach()
        if torch.dist(now, end) > self._rounding(now.dtype) * torch.linalg.vector_norm(end):
            raise RuntimeError(
                f"{self.name} computes other states with all steps as rows of one batch (batch "
                "normalisation?); expected a cell that treats rows independently, or Backprop()"
            )
        for node in nodes([inside], frozenset()):
            leaf = getattr(node, "variable", None)
            if leaf is not None and not any(leaf is t for t in known):
                self._refuse_foreign(f"a tensor of shape {[*leaf.shape]}")

    def _rounding(self, dtype: torch.dtype) -> float:
        """Relative tolerance for rounding, of a state or gradient; real differences are larger."""
        return torch.finfo(torch.bfloat16 if self.is_mixed else dtype).eps ** 0.5

    def _check_functions(self, inside: Tensor, known: list[Tensor], size: int) -> None:
        """Refuse custom functions whose backward pass cannot run twice, or, in a window, adds to
        the gradient: two products would contain that."""
        refuse_unrepeatable(self.name, inside, known, [*self.module.buffers()])
        if size == 1:
            return
        found = gradients([(inside, torch.zeros_like(inside))], known)
        if any(g is not None and has_nonzero(g) for g in found):
            raise RuntimeError(
                f"{self.name} adds to the gradient in its backward pass (a loss of its own?), "
                "which would be counted repeatedly in a window; expected group_size=1, or "
                "Backprop()"
            )
        dtype = inside.dtype if inside.dtype.itemsize < 4 else torch.float32  # a part may have it
        tolerance = self._rounding(dtype)
        if not is_linear(lambda w: gradients([(inside, w)], known)[0], probe(inside), tolerance):
            raise RuntimeError(
                f"{self.name} clips the gradient in its backward pass, which would happen to parts "
                "of it in a window; expected group_size=1, or Backprop()"
            )

    def _check_rows(self, inside: Tensor, x: Tensor, start: Tensor, B: int) -> None:
        """Refuse custom functions whose backward pass mixes rows: the first B rows, run alone, get
        another gradient."""
        w = probe(inside)
        with self.autocast:
            alone = [
                t.narrow(-2, 0, B).detach().requires_grad_(t.requires_grad) for t in (start, x)
            ]
            out = self._run_rows(alone[1], alone[0])
        inputs = [(t, a) for t, a in zip((start, x), alone, strict=True) if t.requires_grad]
        both, few = zip(*inputs, strict=True)
        found = gradients([(inside, w)], both), gradients([(out, w.narrow(-2, 0, B))], few)
        for whole, own in zip(*found, strict=True):
            if own is None:
                continue
            apart = torch.dist(whole.narrow(-2, 0, B), own)
            if apart > self._rounding(own.dtype) * torch.linalg.vector_norm(own):
                raise RuntimeError(
                    f"the backward pass of {self.name} mixes the rows of a batch (by a norm or "
                    "mean?); expected one that treats rows independently, or Backprop()"
                )

    def _run_rows(self, x: Tensor, start: Tensor) -> Tensor:
        try:
            return run_cell(self.module, self.layout, x, start)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.name} fails with all steps as rows of one batch (a buffer with a row for "
                "each sequence?); expected a cell that treats rows independently, or Backprop()"
            ) from error

    def _refuse_foreign(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{self.name} uses {what} that requires a gradient and is no parameter of it; expected "
            "x, its state and its parameters alone, or Backprop()"
        )

    def diagonal(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The carry at all steps (L, B, S); x (L, B, I), states (L, B, S)."""
        L, B = x.shape[:2]
        rows = [self.layout.state(t.flatten(0, 1)) for t in (before, after)]
        with torch.no_grad(), self.autocast:
            carry = _parts(self.carry(x.flatten(0, 1), *rows))
        if len(carry) != len(self.layout.sizes):
            raise ValueError(
                f"carry of {self.name} has {len(carry)} parts; expected "
                f"{len(self.layout.sizes)}, one for each part of the state"
            )
        sizes = zip(carry, self.layout.sizes, strict=True)
        parts = [self._part(d, before, (L * B, size)) for d, size in sizes]
        return torch.cat(parts, -1).unflatten(0, (L, B))

    def _part(self, d: object, like: Tensor, shape: tuple[int, int]) -> Tensor:
        d = torch.as_tensor(0.0 if d is None else d, dtype=like.dtype, device=like.device)
        try:
            return d.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"carry of {self.name} has shape {tuple(d.shape)}; expected a diagonal that "
                f"broadcasts to a state of shape {shape}, rows of all steps"
            ) from None


@contextlib.contextmanager
def _kept(cell: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes, and lists among these, on exit."""
    attributes = [(vars(m), dict(vars(m))) for m in cell.modules()]
    lists = [(v, list(v)) for _, old in attributes for v in old.values() if type(v) is list]
    with kept_buffers(cell):
        try:
            yield
        finally:
            for now, old in attributes:
                now.clear()
                now.update(old)
            for now, old in lists:
                now[:] = old


def run_cell(cell: nn.Module, layout: Layout, x: Tensor, start: Tensor) -> Tensor:
    """s_1 .. s_L (L, B, S), one step after another."""
    states, s = [], start
    for x_t in x:
        s = _step(cell, layout, x_t, s)
        states.append(s)
    return torch.stack(states)


def _step(cell: nn.Module, layout: Layout, x: Tensor, s: Tensor) -> Tensor:
    before = s.view_as(s)  # a tensor of its own: a hook that the cell sets sees this step alone
    parts = tensors_of(cell(x, layout.state(before)), f"what {type(cell).__name__} returns")
    if (sizes := [part.shape[-1] for part in parts]) != layout.sizes:
        raise ValueError(
            f"{type(cell).__name__} returns a state whose parts have sizes {sizes}; expected "
            f"{layout.sizes}, those of the state it gets"
        )
    return torch.cat(parts, -1)


def _parts(state: object) -> Sequence:
    return list(state) if isinstance(state, tuple) else [state]


def tensors_of(state: object, what: str) -> Sequence[Tensor]:
    parts = _parts(state)
    for part in parts:
        if not isinstance(part, Tensor):
            place = "has" if isinstance(state, tuple) else "is"
            kind = type(part).__name__
            raise TypeError(f"{what} {place} a {kind}; expected a tensor or a tuple of tensors")
    return parts
