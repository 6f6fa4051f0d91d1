"""Schedules that are functions of the step alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from highway_bp.check import check_share, check_whole
from highway_bp.methods import Backprop, Method, check_method
from highway_bp.schedules.schedule import K, Measure, check_iterates, check_k, check_list, with_k


class Fixed:
    """A schedule that is a function of the step alone."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Constant(Fixed):
    """The same method at every step.

    Raises:
        TypeError: ``method`` is no gradient method.
    """

    method: Method

    def __post_init__(self) -> None:
        check_method(self.method)

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        return self.method


@dataclass(frozen=True)
class Milestones(Fixed):
    """k = ks[0] at first, ks[1] from at[0] on, and so on.

    Args:
        method: a method with iterations; its k is replaced.
        ks: numbers of iterations, or "bp" for exact.
        at: where each next k begins, increasing, one entry less than ``ks``: fractions of training
            below 1, or steps.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range. Steps after the
            end of training are reported at the first call of `method_for`.
    """

    method: Method
    ks: Sequence[K] = (1, 2, 5, "bp")
    at: Sequence[float] = (0.3, 0.6, 0.9)

    def __post_init__(self) -> None:
        check_iterates(self.method)
        check_list("ks", self.ks)
        check_list("at", self.at)
        if not self.ks:
            raise ValueError("ks=[]; expected at least one k")
        for k in self.ks:
            check_k(k)
        if len(self.at) != len(self.ks) - 1:
            raise ValueError(
                f"at={list(self.at)}; expected {len(self.ks) - 1} milestones, one "
                f"less than ks={list(self.ks)}"
            )
        for place in self.at:
            if isinstance(place, bool) or not isinstance(place, int | float) or not place > 0:
                raise ValueError(f"at={list(self.at)}; expected fractions below 1, or steps")
            if isinstance(place, float) and place >= 1:
                raise ValueError(f"at={list(self.at)}; expected fractions below 1, or whole steps")
        if len({type(place) for place in self.at}) > 1:
            raise ValueError(f"at={list(self.at)}; expected all fractions, or all steps")
        if any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"at={list(self.at)}; expected increasing milestones")

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        starts = [round(p * steps) if isinstance(p, float) else p for p in self.at]
        if starts and starts[-1] >= steps:
            raise ValueError(
                f"at={list(self.at)}, steps {starts}; expected milestones within the "
                f"{steps} steps of training"
            )
        return with_k(self.method, self.ks[sum(step >= start for start in starts)])


@dataclass(frozen=True)
class _Ramp(Fixed, ABC):
    """k from ``start`` to ``end``, exact from the fraction ``exact_from`` of training on.

    Args:
        method: a method with iterations; its k is replaced.
        start, end: the first and the last k.
        exact_from: fraction of training from which on gradients are exact; None: never.
    """

    method: Method
    start: int = 0
    end: int = 5
    exact_from: float | None = None

    def __post_init__(self) -> None:
        check_iterates(self.method)
        check_whole("start", self.start, least=0)
        check_whole("end", self.end, least=0)
        if self.exact_from is not None:
            check_share("exact_from", self.exact_from)

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        ramp = steps if self.exact_from is None else round(self.exact_from * steps)
        if step >= ramp:
            return Backprop()
        way = self.shape(step / max(ramp - 1, 1))
        return with_k(self.method, math.floor(self.start + (self.end - self.start) * way + 0.5))

    @abstractmethod
    def shape(self, way: float) -> float:
        """How far k is from ``start`` to ``end``, 0 to 1, at the fraction ``way`` of the ramp."""


class Linear(_Ramp):
    __doc__ = _Ramp.__doc__

    def shape(self, way: float) -> float:
        return way


class Cosine(_Ramp):
    __doc__ = f"{_Ramp.__doc__}\n    Slow at both ends: half a period of a cosine."

    def shape(self, way: float) -> float:
        return (1 - math.cos(math.pi * way)) / 2


@dataclass(frozen=True)
class BpEvery(Fixed):
    """``method``, with an exact step every ``n`` steps (the n-th, the 2n-th, ...)."""

    method: Method
    n: int = 10

    def __post_init__(self) -> None:
        check_iterates(self.method)
        check_whole("n", self.n, least=1)

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        return Backprop() if (step + 1) % self.n == 0 else self.method
