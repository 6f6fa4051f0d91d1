"""Windows of consecutive steps as the layers of a recurrent chain; each is exact inside.

The n windows of a sequence are n * B rows of one call of the cell. So one backward pass of autograd
gives all their vector-Jacobian products at once. With windows of one step this is the reference for
the closed forms in `gru` and `lstm`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from highway_bp.methods import Method
from highway_bp.rnn.steps import Rows
from highway_bp.rnn.time_system import EVERY, TimeSystem
from highway_bp.segment import gradients


@dataclass
class Windows:
    """A cell's sequence cut into n windows of ``size`` steps; the last one may be shorter.

    Attributes:
        size: steps of a window.
        starts: the states at the windows' starts (n, B, S).
        b_ends: cotangents on the states at the windows' ends (n, B, S).
        K: ``K()`` returns the windows' carries (n, B, C).
        run: ``run(x, start, where)`` takes x (size, m * B, I) and start (m * B, S) of the m windows
            ``where``; returns outputs (size, m * B, H) and end states (m * B, S).
        leaves: the weights that ``run`` uses.
        bounded: whether |K| <= 1.
    """

    size: int
    starts: Tensor
    b_ends: Tensor
    K: Callable[[], Tensor]
    run: Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
    leaves: Sequence[Tensor]
    bounded: bool = False


def window_gradients(
    method: Method, windows: Windows, rows: Rows
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """Return the gradients of x (L, B, I), the initial state (B, S) and the windows' leaves."""
    runs = _runs(windows, rows)
    inner = torch.cat([run.inner() for run in runs])  # (n, B, S)
    b_states = windows.b_ends.clone()
    b_states[:-1] += inner[1:]

    def vjp(w: Tensor, b: Tensor, out: Tensor, at: slice) -> None:
        every = w
        if at != EVERY:  # the graph is for all windows: the others get zeros
            every = w.new_zeros(len(inner), *w.shape[1:])
            every[at] = w
        torch.add(b, torch.cat([run.through(every[run.where]) for run in runs])[at], out=out)

    system = TimeSystem(
        b_states,
        windows.K,
        vjp,
        inner[0],
        whole=True,
        wants_start=rows.wants_start,
        bounded=windows.bounded,
        own=windows.b_ends,
    )
    w = method.solve(system)[: len(inner) + 1]
    pairs: list[tuple[Tensor, Tensor]] = []
    for run in runs:
        pairs += [(run.outputs, run.b), (run.end, w[1:][run.where].flatten(0, 1))]
    inputs = [run.x for run in runs] if rows.wants_x else []
    grads = gradients(pairs, [*inputs, *windows.leaves], retain=False)
    by_x, by_leaf = grads[: len(inputs)], grads[len(inputs) :]
    by_x = [
        torch.zeros_like(rows.x[run.steps]) if g is None else _uncut(g, run.shape[0])
        for g, run in zip(by_x, runs, strict=False)
    ]
    return torch.cat(by_x) if rows.wants_x else None, w[0], by_leaf


def at_ends(t: Tensor, size: int) -> Tensor:
    """The rows of t (L, ...) at the windows' ends (n, ...)."""
    return torch.stack([window[-1] for window in t.split(size)])


def products(K: Tensor, size: int) -> Tensor:
    """The windows' carries (n, B, C) from those of the steps (L, B, C). A product that overflows is
    set to 0: with any carry, the gradient at k = L is exact."""
    found = torch.stack([window.prod(0) for window in K.split(size)])
    known = torch.stack([window.isfinite().all(0) for window in K.split(size)])
    return found.masked_fill(known & ~found.isfinite(), 0.0)


class _Run:
    """Windows of equal size side by side, and the graph of their steps."""

    def __init__(self, windows: Windows, rows: Rows, steps: slice, where: slice):
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a backward pass in inference mode, which records no graph of the cell; expected "
                "it outside, or Backprop()"
            )
        m, starts = where.stop - where.start, windows.starts[where]
        self.where, self.steps, self.shape = where, steps, starts.shape
        self.x = _cut(rows.x[steps], m).detach().requires_grad_(rows.wants_x)
        self.b = _cut(rows.b[0][steps], m)[:-1]  # (size - 1, m * B, H)
        self.start = starts.flatten(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            outputs, self.end = windows.run(self.x, self.start, where)
            self.outputs = outputs[:-1]  # b_ends has the loss on the last

    def through(self, w: Tensor) -> Tensor:
        """Return w (J + K) (m, B, S) at the windows' starts, for w (m, B, S) at their ends."""
        return self._grad(self.end, w.flatten(0, 1))

    def inner(self) -> Tensor:
        """Cotangents (m, B, S) at the starts, from losses on the outputs before the ends."""
        if len(self.outputs) == 0:
            return self.start.new_zeros(self.shape)
        return self._grad(self.outputs, self.b)

    def _grad(self, outputs: Tensor, cotangents: Tensor) -> Tensor:
        # A copy: a custom function of the cell may write into it.
        (v,) = gradients([(outputs, cotangents.clone())], [self.start])
        return self.start.new_zeros(self.shape) if v is None else v.view(self.shape)


def _runs(windows: Windows, rows: Rows) -> list[_Run]:
    """The full windows, then the shorter one at the end."""
    n, full = len(windows.starts), len(rows.x) // windows.size
    split = full * windows.size
    runs = [_Run(windows, rows, slice(0, split), slice(0, full))] if full else []
    if full < n:
        runs.append(_Run(windows, rows, slice(split, None), slice(full, n)))
    return runs


def _cut(t: Tensor, m: int) -> Tensor:
    """(m * size, B, F) -> (size, m * B, F): m windows side by side."""
    return t.unflatten(0, (m, -1)).transpose(0, 1).flatten(1, 2)


def _uncut(t: Tensor, m: int) -> Tensor:
    """The inverse of `_cut`."""
    return t.unflatten(1, (m, -1)).transpose(0, 1).flatten(0, 1)
