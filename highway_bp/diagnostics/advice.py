"""`Advice`: recommends a method from measured step times and gradient errors, and says why."""

import math
from dataclasses import dataclass

from highway_bp.check import check_whole
from highway_bp.diagnostics.gradient_error import GradientError
from highway_bp.methods import Backprop, Highway, Method

MARGIN = 0.05  # a recommended method is at least this much faster than backpropagation
SAME = 1.05  # times closer than this count as equal


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a training step on this device."""

    forward: float  # by plain backpropagation
    backward: float  # by plain backpropagation
    cut_forward: float  # by every other method
    head: float  # backward pass from the loss to the chain
    parameters: float  # the rest of the backward pass at k = 0: all layers' parameter gradients
    iteration: float  # through all blocks once
    layers: int | None  # L if the model is one chain of modules; else None

    @property
    def backprop(self) -> float:
        """A step of plain backpropagation, on one device or with the layers spread over P."""
        return self.forward + self.backward

    def groups(self, method: Highway) -> float:
        """G, the number of groups in a chain of modules; infinite for other models."""
        return math.inf if self.layers is None else math.ceil(self.layers / method.group_size)

    def of(self, method: Highway, devices: int = 1) -> float:
        """A step on this device, or a prediction for several devices as fast as this one.

        On this device, iteration j = 0, 1, ... skips the last j groups, which are exact. On P
        devices, each holds consecutive groups of s layers, at most m = ceil(G / P) groups: a share
        m s / L of the work. The forward pass visits them in turn; communication is left out::

            T_forward + T_head + (m s / L) (T_parameters(s) + k T_iteration)

        With P = L and s = 1 this is the paper's Eq. 13 without the scan. T_parameters(s) grows with
        s up to a whole backward pass: this part goes through all but one layer of a group.
        """
        k, s, G = method.k, method.group_size, self.groups(method)
        inside = max(self.backward - self.head - self.parameters, 0.0)
        parameters = self.parameters + (1 - 1 / s) * inside
        if devices == 1:
            passes = sum(1 - m / G for m in range(min(k, G)))
            return self.cut_forward + self.head + parameters + passes * self.iteration
        share = min(1.0, math.ceil(G / devices) * s / self.layers)
        return self.forward + self.head + share * (parameters + k * self.iteration)


@dataclass(frozen=True)
class Choice:
    """A method, how many times as fast as backpropagation its step is, and why."""

    method: Method
    speed_up: float
    reason: str


@dataclass(frozen=True)
class Advice:
    """What `advise` measured; printed, it is a table and a recommendation."""

    times: StepTimes
    errors: dict[Highway, GradientError]  # of every method measured
    left_out: tuple[Highway, ...]  # methods that were not measured, for lack of time
    devices: tuple[int, ...]  # numbers of devices, above 1, to print predictions for
    least_cosine: float  # of a recommended method's gradient with the exact one

    @property
    def method(self) -> Method:
        """The method for this device; `Backprop()` where no other is worth it."""
        return self.for_devices(1).method

    def for_devices(self, devices: int) -> Choice:
        """The fastest method that is exact enough, if faster than backpropagation by `MARGIN`.

        If times are about equal, the larger cosine decides. For one device, times are measured. For
        several they are predicted: each device has consecutive layers (`StepTimes.of`), and
        backpropagation visits the devices in turn.

        Raises:
            TypeError, ValueError: ``devices`` is not a whole number of at least 1, or is above 1
                for a model that is not a single chain of modules.
        """
        check_whole("devices", devices, least=1)
        if devices > 1 and self.times.layers is None:
            raise ValueError(
                f"devices={devices} for a model with recurrent layers or several chains; expected "
                "one chain of modules, whose layers can lie on several devices"
            )
        cosines = {m: e.cosine for m, e in self.errors.items() if not math.isnan(e.cosine)}
        enough = [m for m, cosine in cosines.items() if cosine >= self.least_cosine]
        exact_enough = f"a cosine of {self.least_cosine:g} or more"
        if not enough:
            largest = f"{max(cosines.values()):.3f}" if cosines else "unknown"
            reason = f"no k below L measured has {exact_enough}, the largest is {largest}"
            return Choice(Backprop(), 1.0, reason)
        seconds = {m: self.times.of(m, devices) for m in enough}
        fast = [m for m in enough if seconds[m] <= SAME * min(seconds.values())]
        best = max(fast, key=cosines.get)
        speed_up = self.times.backprop / seconds[best]
        found = f"the fastest with {exact_enough}: {cosines[best]:.3f}"
        if speed_up >= 1 + MARGIN:
            return Choice(best, speed_up, found)
        reason = f"{self._described(best)} is {found}; "
        reason += f"it takes {1 / speed_up:.2f} times as long as backprop"
        if speed_up > 1:
            reason += f", and only a method at least {MARGIN:.0%} faster is recommended"
        return Choice(Backprop(), 1.0, reason)

    def __str__(self) -> str:
        times, ks = self.times, ", ".join(map(str, sorted({m.k for m in self.left_out})))
        lines = [
            f"A step: backprop {times.backprop:.3g} s, of which forward {times.forward:.3g} s; "
            f"Highway {times.of(Highway(0)):.3g} s at k = 0, an iteration {times.iteration:.2g} s.",
            *self._table(),
            "cosine, error: for the weights as they are; both change during training.",
            "time: of a step, in steps of backprop.",
        ]
        if self.devices:
            lines.append(
                "on P: predicted speed-up on P devices with consecutive layers on each, over "
                "backprop through the same devices, communication left out; hb.shard spreads a "
                "ResidualChain, no converted model; data parallelism may use them better."
            )
        if ks:
            n = len(self.left_out)
            lines.append(f"Not measured, as the time was up: {n} methods with k = {ks}.")
        lines.append(f"On this device: {self._verdict(1)}")
        return "\n".join(lines + [f"On {P} devices: {self._verdict(P)}" for P in self.devices])

    def _verdict(self, devices: int) -> str:
        choice = self.for_devices(devices)
        method = choice.method
        if not isinstance(method, Highway):
            return f"stay with backprop ({choice.reason})."
        return (
            f"Highway, {self._described(method)}: {choice.speed_up:.2f} times as fast as backprop "
            f"({choice.reason})."
        )

    def _described(self, method: Highway) -> str:
        groups = "" if self.times.layers is None else f" in {self.times.groups(method)} groups"
        return f"k = {method.k}{groups}, gamma = {method.gamma}"

    def _table(self) -> list[str]:
        """A row for every k and number of groups, with the gamma of the larger cosine."""
        times, best = self.times, {}
        for method, error in sorted(self.errors.items(), key=lambda item: item[1].cosine):
            best[times.groups(method), method.k] = method, error
        rows = [["groups", "k", "gamma", "cosine", "error", "time"]]
        rows[0] += [f"on {P}" for P in self.devices]
        for (groups, k), (method, error) in sorted(best.items()):
            row = ["-" if times.layers is None else str(groups), str(k), str(method.gamma)]
            row += [f"{x:.3f}" for x in (error.cosine, error.relative_error)]
            row += [f"{times.of(method) / times.backprop:.2f}"]
            row += [f"{times.backprop / times.of(method, P):.2f}" for P in self.devices]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(c.rjust(n) for c, n in zip(row, widths, strict=True)) for row in rows]
