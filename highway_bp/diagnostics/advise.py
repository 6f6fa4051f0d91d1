"""`advise`: which k, which groups, which gamma, for a user's own model on the user's machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from highway_bp.auto_gamma import AutoGamma
from highway_bp.check import check_whole
from highway_bp.diagnostics.advice import Advice, Trial
from highway_bp.diagnostics.gradient_error import error_of, sums_of
from highway_bp.diagnostics.gradients import gradients_of, unchanged
from highway_bp.diagnostics.step_times import Gradients, clock_of, measure_steps
from highway_bp.method_state import chains, sharded_chains
from highway_bp.methods import Backprop, Highway
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.recurrent import Recurrent

Gamma = float | str | AutoGamma


def advise(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    devices: Iterable[int] = (2, 4, 8),
    ks: Iterable[int] = (0, 1, 2, 3, 5, 7),
    gammas: Iterable[Gamma] = (0.0, "auto"),
    least_cosine: float = 0.9,
    margin: float = 0.05,
    seconds: float = 40.0,
) -> Advice:
    """Measure times and gradient errors of Highway-BP, and say whether and how to use it.

    The errors are those of the weights and the batch as they are, and change during training: ask
    again then. A chain of modules is measured whole and cut into as many groups
    as there are devices (`Highway.group_size`); with P groups, k = P - 1 is exact for the layers'
    parameters. The expected times on several devices are `StepTimes.on_devices`. They are left
    out for models with several chains, which follow each other, and with recurrent layers: an
    iteration treats all time steps at once, and these share their weights, so they are no layers
    to be handed out.
    Recurrent layers take gammas that are numbers alone; the others are left out.

    Args:
        model: has a `ResidualChain`, a recurrent layer of this library or a converted trunk; its
            method, gradients, buffers, random state and estimates of gamma are afterwards what
            they were.
        batch: what ``loss_fn`` needs beside the model.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar loss.
        devices: how many devices to think of, besides this one.
        ks: numbers of iterations.
        gammas: values of `Highway.gamma`.
        least_cosine: with the exact gradient; methods below are not recommended.
        margin: nor those that are not faster than backpropagation by this share.
        seconds: about how long to measure. What cannot be decided by then is named in the advice;
            the times come first, from one step of each kind at least.

    Raises:
        ValueError: the model has nothing that takes a method, or is sharded; the loss is no
            scalar or needs no gradient; ``ks`` or ``gammas`` is empty; a value out of its range.
        TypeError: the loss is no tensor, a value is no number.
    """
    if sharded_chains(model):
        raise ValueError(
            f"{type(model).__name__} has its layers on several processes; expected it "
            "before hb.shard, as advise measures one process"
        )
    devices, ks = _whole("devices", devices, least=2), _whole("ks", ks, least=0)
    if isinstance(gammas, str) or not isinstance(gammas, Iterable):
        raise TypeError(f"gammas={gammas!r}; expected a list of them")
    gammas = tuple(dict.fromkeys(Highway(0, gamma).gamma for gamma in gammas))
    _check_numbers(least_cosine, margin, seconds)
    if not ks:
        raise ValueError("ks is empty; expected at least one number of iterations")

    def loss(model: nn.Module) -> Tensor:
        return loss_fn(model, batch)

    with unchanged(model):
        clock = clock_of(model)
        end = clock() + seconds
        gammas = _taken_gammas(model, gammas)
        times, gradients = measure_steps(model, loss, _layers(model), 0.4 * seconds)
        methods = tuple(_methods(times.layers, devices, ks, gammas))
        advice = Advice(times, (), methods, devices, least_cosine, margin)
        exact = gradients[Backprop()]
        for method in (m for m in methods if m in gradients):
            advice = advice.with_trial(_trial(method, gradients[method], exact))
        while advice.left_out:
            method = _next(advice)
            if clock() + times.here(method) + times.iteration > end:  # an iteration for "auto"
                break
            advice = advice.with_trial(_trial(method, gradients_of(model, loss, method), exact))
    return advice


def _trial(method: Highway, gradients: Gradients, exact: Gradients) -> Trial:
    error = error_of(method.k, sums_of(gradients, {}, exact))
    return Trial(method, error.cosine, error.relative_error)


def _whole(name: str, values: Iterable[int], least: int) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}; expected a list of whole numbers")
    values = tuple(values)
    for value in values:
        check_whole(name, value, least)
    return tuple(sorted(set(values)))


def _check_numbers(least_cosine: float, margin: float, seconds: float) -> None:
    for name, value, fits, wanted in (
        ("least_cosine", least_cosine, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("margin", margin, lambda x: 0 <= x < math.inf, "of at least 0"),
        ("seconds", seconds, lambda x: 0 < x < math.inf, "above 0"),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r}; expected a number {wanted}")
        if not fits(value):
            raise ValueError(f"{name}={value}; expected a number {wanted}")


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, MethodRNN | Recurrent) for m in model.modules())


def _taken_gammas(model: nn.Module, gammas: tuple[Gamma, ...]) -> tuple[Gamma, ...]:
    """Those that the model can take."""
    taken = gammas
    if _is_recurrent(model):
        taken = tuple(g for g in gammas if isinstance(g, int | float))
    if not taken:
        kind = "recurrent layers" if gammas else "a model"
        raise ValueError(f"gammas={gammas} for {kind}; expected a number among them")
    return taken


def _layers(model: nn.Module) -> int | None:
    """L of the one chain of modules, if that is all the model has."""
    found = list(chains(model))
    return len(found[0]) if len(found) == 1 and not _is_recurrent(model) else None


def _methods(
    layers: int | None, devices: tuple[int, ...], ks: tuple[int, ...], gammas: tuple[Gamma, ...]
) -> list[Highway]:
    """What to try, k upwards, at each from coarse groups to fine; no k that is exact anyway."""
    sizes = {1} if layers is None else {1, *(math.ceil(layers / P) for P in devices)}
    return [
        Highway(k, gamma, size)
        for k in ks
        for size in sorted(sizes, reverse=True)
        for gamma in gammas
        if layers is None or k < math.ceil(layers / size)
    ]


def _next(advice: Advice) -> Highway:
    """The first that can still change the advice, if any can; of the better gamma, if any is."""
    gamma = _better_gamma(advice.trials)
    return min(
        advice.left_out,
        key=lambda m: (not advice.may_win(m), gamma is not None and m.gamma != gamma),
    )


def _better_gamma(trials: Iterable[Trial]) -> Gamma | None:
    """The one with the larger cosine where two were last compared."""
    cosines: dict[tuple[int, int], dict[Gamma, float]] = {}
    for t in trials:
        cosines.setdefault((t.method.k, t.method.group_size), {})[t.method.gamma] = t.cosine
    compared = [found for found in cosines.values() if len(found) > 1]
    return max(compared[-1], key=compared[-1].get) if compared else None
