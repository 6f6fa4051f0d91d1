"""`StepTimes`: what the parts of a training step cost on this machine, and what they add up to."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highway_bp.diagnostics.gradients import cuda_devices, gradients_of
from highway_bp.methods import Backprop, Highway, LinearSystem, Method, States

MOST_ROUNDS = 200
Clock = Callable[[], float]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a step, each the lower quartile of ``rounds`` measurements.

    The other work of a machine only ever adds to a time.

    Attributes:
        forward, backward: of plain backpropagation.
        cut_forward: the forward pass of every other method.
        head: the backward pass from the loss to the chain.
        iteration: through all blocks once.
        parameters: the rest of the backward pass at k = 0: all layers' parameter gradients.
        layers: L, of a model whose one chain of modules can be spread over devices; else None.
    """

    forward: float
    backward: float
    cut_forward: float
    head: float
    iteration: float
    parameters: float
    layers: int | None
    rounds: int

    @property
    def backprop(self) -> float:
        """A step of plain backpropagation: on one device, and on P that hold P runs of layers."""
        return self.forward + self.backward

    def groups(self, method: Highway) -> int:
        """How many layers the method sees, in a chain of modules."""
        return math.ceil(self.layers / method.group_size)

    def here(self, method: Highway) -> float:
        """A step on this device. Iteration m leaves the last m groups out: they are exact."""
        passes = float(method.k)
        if self.layers is not None:
            G = self.groups(method)
            passes = sum(1 - m / G for m in range(min(method.k, G)))
        return self.cut_forward + self.head + self._parameters(method) + passes * self.iteration

    def on_devices(self, method: Highway, devices: int) -> float:
        """A step on P devices as fast as this one, expected, communication left out.

        Each holds a run of whole groups; with G groups of s layers the fullest holds m =
        ceil(G / P) of them, which is a share m s / L of the work (1/P where all is even)::

            T_forward + T_head + (m s / L) (T_parameters(s) + k T_iteration)

        The forward pass goes through the devices in turn. P = L and s = 1 is the paper's Eq. 13,
        without the scan.
        """
        held = math.ceil(self.groups(method) / devices) * method.group_size
        share = min(1.0, held / self.layers)
        backward = self._parameters(method) + method.k * self.iteration
        return self.forward + self.head + share * backward

    def _parameters(self, method: Highway) -> float:
        """All parameter gradients: in groups of s layers they need the way through all but one.

        From ``parameters`` at s = 1 up to the whole backward pass of backpropagation.
        """
        inside = max(self.backward - self.head - self.parameters, 0.0)
        return self.parameters + (1 - 1 / method.group_size) * inside


def measure_steps(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], layers: int | None, seconds: float
) -> tuple[StepTimes, dict[Method, Gradients]]:
    """The times, and the gradients they were taken of.

    In turn, so that a drift hits all, and shuffled, so that nothing periodic hits always the same.
    """
    clock, gradients, shuffle = clock_of(model), {}, random.Random(0).shuffle

    def one_pass(method: Method) -> _Pass:
        gradients[method], found = _pass(model, loss_fn, method, clock)
        return found

    begin, rounds = clock(), []
    one_pass(Backprop())  # warm-up
    while not rounds or _fits_one_more(clock() - begin, len(rounds), seconds):
        methods = [Backprop(), Highway(0), Highway(1)]
        shuffle(methods)
        rounds.append({method: one_pass(method) for method in methods})
    if len(rounds) > 2:
        del rounds[0]  # warm-up too
    plain, zero, one = ([r[m] for r in rounds] for m in (Backprop(), Highway(0), Highway(1)))
    iteration = typical(p.solving for p in one) - typical(p.solving for p in zero)
    times = StepTimes(
        forward=typical(p.forward for p in plain),
        backward=typical(p.backward for p in plain),
        cut_forward=typical(p.forward for p in zero),
        head=typical(p.head for p in zero),
        iteration=max(iteration, 0.0),
        parameters=typical(p.backward - p.head for p in zero),
        layers=layers,
        rounds=len(plain),
    )
    return times, gradients


def typical(seconds: Iterable[float]) -> float:
    """The lower quartile; of fewer than four values the smallest."""
    values = sorted(seconds)
    return values[(len(values) - 1) // 4]


def _fits_one_more(passed: float, rounds: int, seconds: float) -> bool:
    return rounds < MOST_ROUNDS and passed * (1 + 1 / rounds) <= seconds


def clock_of(model: nn.Module) -> Clock:
    """Seconds, once the devices of the model have done what they were asked."""
    devices = cuda_devices(model)

    def clock() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@dataclass(frozen=True)
class _Pass:
    forward: float
    backward: float
    head: float  # of the backward pass, until the method is asked for the first time
    solving: float  # of the backward pass, in the method


def _pass(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], method: Method, clock: Clock
) -> tuple[Gradients, _Pass]:
    clocked, forward = _Clocked(method, clock), []

    def loss(model: nn.Module) -> Tensor:
        forward.append(clock())
        value = loss_fn(model)
        forward.append(clock())
        return value

    gradients = gradients_of(model, loss, clocked)
    end, (begin, middle) = clock(), forward
    asked = end if clocked.asked is None else clocked.asked
    return gradients, _Pass(middle - begin, end - middle, asked - middle, clocked.solving)


class _Clocked:
    """``method``; notes when it is asked first, and how long its solutions take together."""

    def __init__(self, method: Method, clock: Clock):
        self._method, self._clock = method, clock
        self.asked: float | None = None
        self.solving = 0.0

    def groups(self, L: int) -> list[range] | None:
        return self._method.groups(L)

    def solve(self, system: LinearSystem) -> States:
        begin = self._clock()
        if self.asked is None:
            self.asked = begin
        w = self._method.solve(system)
        self.solving += self._clock() - begin
        return w
