"""`Advice`: from measured errors and times to a method, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from highway_bp.check import check_whole
from highway_bp.diagnostics.advice_text import text_of
from highway_bp.diagnostics.step_times import StepTimes
from highway_bp.methods import Backprop, Highway, Method

SAME = 1.05  # times as long is no difference


@dataclass(frozen=True)
class Trial:
    """How far the gradient of a method is from the exact one (as in `GradientError`)."""

    method: Highway
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Choice:
    """A method, how many times as fast as backpropagation its step is, and why."""

    method: Method
    speed_up: float
    reason: str


@dataclass(frozen=True)
class Advice:
    """What `advise` found; its text is a table and a recommendation.

    Attributes:
        times: of the parts of a step on this device.
        trials: every method measured.
        left_out: methods that were asked for and not measured, as the time was up.
        devices: the numbers of devices the text speaks of.
        least_cosine: with the exact gradient, of any method that is recommended.
        margin: by how much it has to be faster than backpropagation.
    """

    times: StepTimes
    trials: tuple[Trial, ...]
    left_out: tuple[Highway, ...]
    devices: tuple[int, ...]
    least_cosine: float
    margin: float

    @property
    def here(self) -> Choice:
        """What to do on this device."""
        return self._choose(self.times.here)

    @property
    def method(self) -> Method:
        """The method for this device; `Backprop()` where no other is worth it."""
        return self.here.method

    def for_devices(self, devices: int) -> Choice:
        """What to do with the layers in consecutive runs on several devices.

        Compared, by `StepTimes.on_devices`, with backpropagation on the same devices, which goes
        through them in turn, the parameters' gradients included. Data parallelism may be the
        better use of the same devices.

        Raises:
            ValueError: the model is no single chain of modules, or ``devices`` is below 2.
        """
        check_whole("devices", devices, least=2)
        if self.times.layers is None:
            raise ValueError(
                f"devices={devices} for a model with recurrent layers or several chains; expected "
                "one chain of modules, whose layers can lie on several devices"
            )
        return self._choose(partial(self.times.on_devices, devices=devices))

    def with_trial(self, trial: Trial) -> Advice:
        """The advice with one method more measured."""
        left_out = tuple(m for m in self.left_out if m != trial.method)
        return replace(self, trials=(*self.trials, trial), left_out=left_out)

    def may_win(self, method: Highway) -> bool:
        """Whether its error, not measured yet, could make it the choice here or on devices."""
        if any(self._too_far_off(t) and _has_all_paths_of(t.method, method) for t in self.trials):
            return False
        places = [self.times.here]
        if self.times.layers is not None:
            places += [partial(self.times.on_devices, devices=P) for P in self.devices]
        return any(self._beats_choice(method, seconds) for seconds in places)

    def _too_far_off(self, trial: Trial) -> bool:
        return not trial.cosine >= self.least_cosine  # nan is

    def _beats_choice(self, method: Highway, seconds: Callable[[Highway], float]) -> bool:
        speed_up = self.times.backprop / seconds(method)
        return speed_up >= 1 + self.margin and speed_up > self._choose(seconds).speed_up

    def _choose(self, seconds: Callable[[Highway], float]) -> Choice:
        return choose(self.trials, seconds, self.times.backprop, self.least_cosine, self.margin)

    def __str__(self) -> str:
        return text_of(self)


def choose(
    trials: Iterable[Trial],
    seconds: Callable[[Highway], float],
    backprop: float,
    least_cosine: float,
    margin: float,
) -> Choice:
    """The smallest step time among methods exact enough, if it beats backprop by the margin.

    Of times that a measurement can hardly tell apart, the larger cosine.
    """
    trials = list(trials)
    if not trials:
        return _stay("every k that was asked for is L or more, where it is exact")
    trials = [t for t in trials if not math.isnan(t.cosine)]
    if not trials:
        return _stay("the gradient of no k could be compared with the exact one")
    enough = [t for t in trials if t.cosine >= least_cosine]
    if not enough:
        best = max(trials, key=lambda t: t.cosine)
        return _stay(
            f"no cosine measured is {least_cosine:g} or more, the largest is "
            f"{best.cosine:.3f} at k = {best.method.k}"
        )
    least = min(seconds(t.method) for t in enough)
    best = max((t for t in enough if seconds(t.method) <= SAME * least), key=lambda t: t.cosine)
    speed_up = backprop / seconds(best.method)
    fastest = f"the fastest with a cosine of {least_cosine:g} or more"
    if speed_up < 1 + margin:
        return _stay(
            f"{fastest}, k = {best.method.k}, takes {1 / speed_up:.2f} times as long as "
            f"backprop; expected {margin:.0%} faster at least"
        )
    return Choice(best.method, speed_up, f"{fastest}: {best.cosine:.3f}")


def _stay(reason: str) -> Choice:
    return Choice(Backprop(), 1.0, reason)


def _has_all_paths_of(one: Highway, other: Highway) -> bool:
    """Nearly all, where the groups of one are not runs of the other's."""
    return one.gamma == other.gamma and one.k >= other.k and one.group_size >= other.group_size
