"""`advise`: recommends k, groups and gamma for a user's own model on the user's machine."""

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Real
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from highway_bp.auto_gamma import AutoGamma
from highway_bp.check import check_share, whole_numbers
from highway_bp.diagnostics.advice import Advice, StepTimes
from highway_bp.diagnostics.gradient_error import error_of, sums_of
from highway_bp.diagnostics.gradients import check_one_process, clock_of, gradients_of, unchanged
from highway_bp.method_state import chains
from highway_bp.methods import Backprop, Highway, Method
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.recurrent import Recurrent

ROUNDS = 20  # of timed steps, at most


def advise(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    devices: Iterable[int] = (2, 4, 8),
    ks: Iterable[int] = (0, 1, 2, 3, 5, 7),
    gammas: Iterable[float | str | AutoGamma] = (0.0, "auto"),
    least_cosine: float = 0.9,
    seconds: float = 40.0,
    progress: bool | None = None,
) -> Advice:
    """Measure times and gradient errors of Highway-BP, and recommend a method.

    The errors are those of the present weights and this batch. They change during training, so
    measure again later. A chain of modules is measured with groups of one layer, and with as many
    groups as there are devices (`Highway.group_size`); with P groups, k = P - 1 is exact for the
    layers' parameters. If a model has several chains or recurrent layers, there is no prediction
    for several devices.

    Args:
        model: see `gradient_error`; it is left unchanged.
        batch, loss_fn: ``loss_fn(model, batch)`` returns a scalar loss.
        devices: the numbers of devices to predict for, besides this one.
        ks: numbers of iterations.
        gammas: values of `Highway.gamma`; recurrent layers use the numbers among them.
        least_cosine: a recommended method's gradient has at least this cosine with the exact one.
        seconds: approximate time for measuring: step times first, then errors, small k first.
        progress: report every measurement on stderr; None: only if stderr is a terminal.

    Returns:
        An `Advice`; print it.

    Raises:
        TypeError, ValueError: nothing in the model has a method, or the model is sharded; the loss
            is no scalar with a gradient; an argument is empty or out of its range.
    """
    check_one_process(model, "advise")
    devices, ks = whole_numbers("devices", devices, 2), whole_numbers("ks", ks, 0)
    if not ks:
        raise ValueError("ks is empty; expected at least one number of iterations")
    check_share("least_cosine", least_cosine)
    if not isinstance(seconds, Real) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds!r}; expected a number above 0")
    if isinstance(gammas, str) or not isinstance(gammas, Iterable):
        raise TypeError(f"gammas={gammas!r}; expected a list of them")
    is_recurrent = any(isinstance(m, MethodRNN | Recurrent) for m in model.modules())
    usable = [g for g in gammas if isinstance(g, Real) or not is_recurrent]
    if not usable:
        kind = "recurrent layers" if is_recurrent else "a model"
        raise ValueError(f"gammas={gammas} for {kind}; expected at least one number in it")
    found = list(chains(model))
    layers = found[0].length if len(found) == 1 and not is_recurrent else None
    devices = () if layers is None else tuple(sorted(set(devices)))
    sizes = {1} if layers is None else {1, *(math.ceil(layers / P) for P in devices)}
    highways = (
        Highway(k, gamma, size)
        for k in sorted(ks)
        for size in sorted(sizes, reverse=True)
        for gamma in usable
        if layers is None or k < math.ceil(layers / size)  # skip exact ones
    )
    methods = list(dict.fromkeys(highways))

    def loss(model: nn.Module) -> Tensor:
        return loss_fn(model, batch)

    def report(line: str) -> None:
        if progress or (progress is None and sys.stderr.isatty()):
            print(f"advise: {line}", file=sys.stderr, flush=True)

    with unchanged(model):
        clock = clock_of(model)
        end = clock() + seconds
        times, gradients = _timed_steps(model, loss, layers, 0.4 * seconds, report)
        exact, errors = gradients[Backprop()], {}
        for method in sorted(methods, key=lambda m: m not in gradients):
            if method not in gradients:
                if clock() + times.of(method) + times.iteration > end:  # an iteration for "auto"
                    break
                gradients[method] = gradients_of(model, loss, method)
            errors[method] = error_of(method.k, sums_of(gradients.pop(method), {}, exact))
            what = f"k={method.k} gamma={method.gamma} group_size={method.group_size}"
            report(f"{what}: cosine {errors[method].cosine:.3f}, {end - clock():.0f} s left")
    left_out = tuple(m for m in methods if m not in errors)
    return Advice(times, errors, left_out, devices, least_cosine)


def _timed_steps(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    layers: int | None,
    seconds: float,
    report: Callable[[str], None],
) -> tuple[StepTimes, dict[Method, dict[str, Tensor]]]:
    """Time steps of backpropagation, k = 0 and k = 1 in turn; also return their gradients.

    Times are lower quartiles, as other work on the machine can only make a step slower.
    """
    clock, gradients, rounds = clock_of(model), {}, []

    def step(method: Method) -> tuple[float, float, float, float]:
        """Seconds of: forward pass; backward pass up to the chain; rest of it; all solves."""
        t: list[float] = []  # begin and end of: forward pass, each solve; the step's end

        def timed(call: Callable, *args) -> Any:
            t.append(clock())
            result = call(*args)
            t.append(clock())
            return result

        timing = SimpleNamespace(group_size=method.group_size, solve=partial(timed, method.solve))
        gradients[method] = gradients_of(model, partial(timed, loss_fn), timing)
        t.append(clock())
        return t[1] - t[0], t[2] - t[1], t[-1] - t[2], sum(t[3:-1:2]) - sum(t[2:-1:2])

    begin = clock()
    while not rounds or (len(rounds) < ROUNDS and clock() - begin < seconds):
        report(f"timing steps, round {len(rounds) + 1} of {ROUNDS} at most")
        rounds.append([step(method) for method in (Backprop(), Highway(0), Highway(1))])
    warm = rounds[1:] or rounds
    plain, zero, one = (
        [sorted(times)[(len(times) - 1) // 4] for times in zip(*steps, strict=True)]
        for steps in zip(*warm, strict=True)
    )
    iteration = max(one[3] - zero[3], 0.0)
    times = StepTimes(plain[0], plain[1] + plain[2], *zero[:3], iteration, layers)
    return times, gradients
