"""`error_bound`: how far w^k can be from the exact w, how far it seems, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from highway_bp.auto_gamma import AutoGamma
from highway_bp.check import check_whole
from highway_bp.diagnostics.bounds import (
    increment_estimate,
    probe_estimate,
    remainder_bound,
    residual_bound,
)
from highway_bp.diagnostics.gradients import gradients_of, unchanged
from highway_bp.diagnostics.layer_norms import block, layer_norms
from highway_bp.diagnostics.spectral import norm
from highway_bp.methods import Backprop, FixedPoint, Highway
from highway_bp.module_system import ModuleSystem, States
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.recurrent import Recurrent


@dataclass(frozen=True)
class ErrorBound:
    """Of one k, over all states: ||w - w^k|| / ||w||, bounded, estimated and measured.

    bound: from norms alone, before any iteration (theory.md, section 2).
    residual_bound: from norms and what w^k leaves of the equations (section 4).
    probe_estimate: from the gains of random signs, before any iteration (section 5).
    residual_estimate: the residual bound with gains along w^k instead of norms.
    increment_estimate: a geometric series of the last two increments; nan for k = 0.
    measured: against the exact w.

    The bounds hold but for rounding and the chance `FAILURE` of each norm; the estimates may be
    too low. Where the exact w is zero, all are nan.
    """

    k: int
    bound: float
    residual_bound: float
    probe_estimate: float
    residual_estimate: float
    increment_estimate: float
    measured: float


def error_bound(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    ks: Iterable[int] = range(6),
    method: Highway | FixedPoint | None = None,
) -> list[ErrorBound]:
    """Bounds and estimates of the error in the gradients of the states, and the error, at every k.

    Taken over all states of all chains, each with its exact b. The norms take some 200 products
    with every block: this is for understanding, not for every step.

    Args:
        model: has a `ResidualChain` or a converted trunk; its method, gradients, buffers and
            random state are afterwards what they were.
        loss_fn: ``loss_fn(model)`` runs the model on a batch and returns a scalar loss; called
            once. Its attention runs in plain operations, which can be differentiated twice.
        ks: numbers of iterations.
        method: `Highway` (the default) or `FixedPoint`, the k of which does not count.

    Raises:
        ValueError: no chain, or one that no gradient reaches; a recurrent layer; another method;
            layers whose backward pass cannot be differentiated (compiled ones, custom functions).
    """
    method = Highway(0) if method is None else method
    if not isinstance(method, Highway | FixedPoint):
        raise ValueError(f"method={method!r}; expected Highway or FixedPoint, with any k")
    ks = list(ks)
    for k in ks:
        check_whole("ks", k, least=0)
    recurrent = [m._get_name() for m in model.modules() if isinstance(m, MethodRNN | Recurrent)]
    if recurrent:
        raise ValueError(
            f"model={model._get_name()} has a recurrent layer, {recurrent[0]}; expected chains of "
            "layers: a ResidualChain whose layers are the steps"
        )
    reading = _Reading(method, max(ks, default=0))
    with unchanged(model), sdpa_kernel(SDPBackend.MATH):
        gradients_of(model, loss_fn, reading)
    return [_over_all_chains(k, reading.found) for k in ks]


@dataclass(frozen=True)
class _Row:
    """One chain, one k; norms over all of its states."""

    bound: float
    residual_bound: float
    probe_estimate: float
    residual_estimate: float
    increment: float
    measured: float


class _Reading:
    """A method that solves exactly, and notes of every chain ||w|| and a `_Row` per k."""

    def __init__(self, method: Highway | FixedPoint, k: int):
        self._method, self._k = method, k
        self.found: list[tuple[float, list[_Row]]] = []

    def groups(self, L: int) -> list[range]:
        return self._method.groups(L)

    def solve(self, system: ModuleSystem) -> States:
        exact = _wanted(system, Backprop().solve(system))
        iterates = _Iterates(system, self._gammas(system), exact)
        Highway(min(self._k, system.length), gamma="auto").solve(iterates)
        self.found.append((math.hypot(*map(norm, exact)), iterates.rows))
        return exact

    def _gammas(self, system: ModuleSystem) -> list[float]:
        gamma = getattr(self._method, "gamma", 1.0)  # the fixed point's
        if isinstance(gamma, int | float):
            return [float(gamma)] * system.length
        return system.smallest_blocks(AutoGamma() if gamma == "auto" else gamma)


class _Iterates:
    """A linear system that judges every w^k, k = 0, 1, ..., which `Highway` makes of it."""

    def __init__(self, system: ModuleSystem, gammas: list[float], exact: States):
        self._system, self._gammas, self._exact = system, gammas, exact
        self._b = _wanted(system, system.cotangents())
        self._norms = layer_norms(system, gammas)
        self._last: States = [None] * len(exact)
        self.rows: list[_Row] = []

    def __getattr__(self, name: str):
        return getattr(self._system, name)

    def smallest_blocks(self, auto: AutoGamma) -> list[float]:
        return self._gammas

    def scan(self, v: States, gamma: list[float], states: range) -> States:
        w = self._system.scan(v, gamma, states)
        wanted = _wanted(self._system, w)
        self.rows.append(self._judged(wanted))
        self._last = wanted  # no later call writes into a tensor of w
        return w

    def _judged(self, w: States) -> _Row:
        k, norms = len(self.rows), self._norms
        residuals, gains = self._residuals(w)
        b = [*map(norm, self._b)]
        per_state = (
            remainder_bound(norms.blocks, norms.carries, b, k, norms.layers),
            residual_bound(norms.layers, residuals),
            probe_estimate(norms.block_gains, norms.carry_gains, b, k),
            residual_bound(gains, residuals),
            [_distance(*pair) for pair in zip(w, self._last, strict=True)],
            [_distance(*pair) for pair in zip(w, self._exact, strict=True)],
        )
        return _Row(*(math.hypot(*values) for values in per_state))

    def _residuals(self, w: States) -> tuple[list[float], list[float]]:
        """r_0 .. r_L of w, and ||w_i (J_i + K_i)|| / ||w_i|| for i = 1..L."""
        residuals, gains = [], []
        for i, segment in enumerate(self._system.segments):
            wA, size, b = None, norm(w[i + 1]), self._b[i]
            if size and segment.h_in.requires_grad:
                wA = block(segment, self._system.carry(i), 1.0)(w[i + 1])
            gains.append(norm(wA) / size if size else 0.0)
            residuals.append(_distance(b if wA is None else wA if b is None else wA + b, w[i]))
        return [*residuals, 0.0], gains


def _over_all_chains(k: int, found: Sequence[tuple[float, list[_Row]]]) -> ErrorBound:
    whole = math.hypot(*(w for w, _ in found))
    upto = [[rows[m] for _, rows in found if m < len(rows)] for m in range(k + 1)]
    increments = [math.hypot(*(row.increment for row in rows)) for rows in upto]
    columns = zip(*(astuple(rows[min(k, len(rows) - 1)]) for _, rows in found), strict=True)
    bound, *estimates, _, measured = (math.hypot(*column) for column in columns)
    last = increment_estimate(increments) if bound else 0.0  # k >= L
    values = [bound, *estimates, last, measured]
    return ErrorBound(k, *(x / whole if whole else math.nan for x in values))


def _wanted(system: ModuleSystem, w: States) -> States:
    """w without the states below the first trainable layer, the gradients of which nobody wants."""
    kept = zip(system.segments, w[:-1], strict=True)
    return [*(v if segment.h_in.requires_grad else None for segment, v in kept), w[-1]]


def _distance(t: Tensor | None, u: Tensor | None) -> float:
    return norm(u if t is None else t if u is None else t - u)
