"""`Adaptive`: a k that follows the measured error of the gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from highway_bp.check import check_share, check_whole
from highway_bp.diagnostics.gradient_error import GradientError
from highway_bp.methods import Method
from highway_bp.schedules.schedule import Measure, check_iterates, check_list, with_k

SIGNALS = ("relative_error", "cosine", "increment")
ITERATION = 1 / 3  # of a step's time: a backward pass through the blocks' inputs


@dataclass
class Adaptive:
    """The smallest k of a ladder whose gradient error is within ``tolerance``; exact at the end.

    The first measurement takes all rungs (values of k), later ones the current rung and its two
    neighbours. The schedule goes up one rung if the error is too large, and down one if the lower
    rung's error is small enough. If the error is too large on the last rung, training is exact
    until the next measurement.

    A measurement runs the step's batch once more by backpropagation and once by each rung. It is
    followed by so many steps that measuring takes a share ``budget`` of their work; an iteration
    counts as a third of a step.

    Args:
        method: a method with iterations; its k is replaced.
        tolerance: largest allowed signal: relative error or increment of the gradient, or one minus
            its cosine (`hb.gradient_error`).
        ks: the ladder, increasing.
        signal: "relative_error", "cosine", or "increment" (of the rung above).
        budget: share of the training's work that may go into measuring.
        exact_from: fraction of training from which on gradients are exact.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    method: Method
    tolerance: float = 0.3
    ks: Sequence[int] = (0, 1, 2, 3, 5, 8)
    signal: str = "relative_error"
    budget: float = 0.03
    exact_from: float = 0.9
    rung: int = field(default=0, init=False)
    next_check: int = field(default=0, init=False)
    errors: list[tuple[int, float]] = field(default_factory=list, init=False)  # latest (k, signal)

    def __post_init__(self) -> None:
        check_iterates(self.method)
        for name in ("tolerance", "budget", "exact_from"):
            check_share(name, getattr(self, name))
        if self.signal not in SIGNALS:
            raise ValueError(f"signal={self.signal!r}; expected one of {', '.join(SIGNALS)}")
        check_list("ks", self.ks)
        for k in self.ks:
            check_whole("ks", k, least=0)
        if len(self.ks) < 2 or any(a >= b for a, b in pairwise(self.ks)):
            raise ValueError(f"ks={list(self.ks)}; expected at least two increasing numbers")

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        """See `Schedule.method_for`; without ``measure`` the rung does not change."""
        if step >= round(self.exact_from * steps):
            return with_k(self.method, "bp")
        if measure is not None and step >= self.next_check:
            self._choose(step, measure)
        return with_k(self.method, self.ks[self.rung] if self.rung < len(self.ks) else "bp")

    def state_dict(self) -> dict[str, Any]:
        return {"rung": self.rung, "next_check": self.next_check, "errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rung, self.next_check = state["rung"], state["next_check"]
        self.errors = [tuple(pair) for pair in state["errors"]]

    def _choose(self, step: int, measure: Measure) -> None:
        last = len(self.ks) - 1
        low, high = 0, last
        if self.errors:  # of the previous measurement
            low, high = max(self.rung - 1, 0), min(self.rung + 1, last)
        ks = self.ks[low : high + 1]
        found = self._signals(measure(self.method, ks))
        self.errors = list(zip(ks, found, strict=True))
        enough = [low + i for i, error in enumerate(found) if error <= self.tolerance]
        self.rung = min(enough, default=last + 1 if high == last else high)
        work = 1 + sum(1 + k * ITERATION for k in ks)  # in steps
        self.next_check = step + math.ceil(work / self.budget)

    def _signals(self, errors: Sequence[GradientError]) -> list[float]:
        """For every rung, the number to compare with the tolerance; nan if a gradient is zero."""
        if self.signal == "relative_error":
            return [e.relative_error for e in errors]
        if self.signal == "cosine":
            return [1 - e.cosine for e in errors]
        # the change by the rung above; the topmost rung has none above and always passes
        return [*(e.increment for e in errors[1:]), 0.0]
