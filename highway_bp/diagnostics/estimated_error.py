"""`estimated_error`: estimates how far w^k is from the exact w, without computing w."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from highway_bp.auto_gamma import AutoGamma
from highway_bp.check import whole_numbers
from highway_bp.diagnostics.gradients import check_one_process, gradients_of, unchanged
from highway_bp.methods import FixedPoint, Highway, States
from highway_bp.mgrit import GridSystem


@dataclass(frozen=True)
class EstimatedError:
    """For one k: an estimate (no bound) of ||w - w^k|| / ||w|| over all states."""

    k: int
    relative_error: float


def estimated_error(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    ks: Iterable[int] = range(6),
    method: Highway | FixedPoint | None = None,
) -> list[EstimatedError]:
    """Estimate the error in the gradients of the states at every k, without the exact gradient.

    With A = J + K, the error solves the equations of w with the residual r of w^k in place of b::

        r_i = b_i + w^k_{i+1} A_{i+1} - w^k_i        (w - w^k)_i = (w - w^k)_{i+1} A_{i+1} + r_i

    The estimate is e_i = ||r_i|| + l_{i+1} e_{i+1} with l_i = ||w^k_i A_i|| / ||w^k_i||. With
    l_i = ||A_i|| it would be a bound; the estimate may be too low (docs/method.md, section 5).
    ||w^k|| of the largest k is used for ||w||, so one small k alone says little. Each k costs its
    iteration and one more pass through the blocks. If a model solves several systems (chains,
    recurrent layers, directions), each is estimated by itself: an error in the cotangents that a
    system gets from the others is not counted.

    Args:
        model: see `gradient_error`; it is left unchanged.
        loss_fn: ``loss_fn(model)`` runs the model on a batch and returns a scalar loss.
        ks: numbers of iterations.
        method: `Highway` (the default) or `FixedPoint`; its k and tolerance are ignored.

    Raises:
        TypeError, ValueError: another method; no chain, or one that no gradient reaches; layers on
            several processes; gamma="auto" with a recurrent layer; a k that is not a whole number
            of at least 0; a loss that is not a scalar tensor with a gradient.
    """
    method = Highway(0) if method is None else method
    if not isinstance(method, Highway | FixedPoint):
        raise ValueError(f"method={method!r}; expected Highway or FixedPoint, with any k")
    check_one_process(model, "estimated_error")
    iterating = _Iterating(method, whole_numbers("ks", ks, least=0))
    with unchanged(model):
        gradients_of(model, loss_fn, iterating)
    whole = math.hypot(*iterating.sizes)
    errors = {k: math.hypot(*found) for k, found in iterating.errors.items()}
    return [EstimatedError(k, e / whole if whole else math.nan) for k, e in errors.items()]


class _Iterating:
    """A method that iterates up to the largest of ``ks`` and estimates the error of each w^k.

    Attributes:
        errors: by k, the estimates of ||w - w^k||, one for each solution.
        sizes: ||w^k|| at the largest k, one for each solution.
    """

    def __init__(self, method: Highway | FixedPoint, ks: list[int]):
        self.group_size = method.group_size
        self.gamma = getattr(method, "gamma", 1.0)  # of FixedPoint
        self.errors: dict[int, list[float]] = {k: [] for k in ks}
        self.sizes: list[float] = []

    def solve(self, system: GridSystem) -> States:
        L, b, gamma, every = system.length, system.cotangents(), self.gamma, range(system.length)
        if not isinstance(gamma, Real):
            gamma = system.smallest_blocks(AutoGamma() if gamma == "auto" else gamma)
        w = system.scan(system.cotangents(), gamma, every)
        for k in range(max(self.errors, default=0) + 1):
            if 0 < k <= L:
                w = system.scan(system.through_blocks(w, gamma, every), gamma, every)
            if k in self.errors:
                each = w, b, system.leap(w, 1, every)
                error = _estimate(*(_states(x, L) for x in each)) if k < L else 0.0
                self.errors[k].append(error)
        self.sizes.append(_norm(*_states(w, L)))
        return w


def _estimate(w: list[Tensor], b: list[Tensor], wA: list[Tensor]) -> float:
    """||e|| over all states, from e_L = 0 down: e_i = ||r_i|| + l_{i+1} e_{i+1}."""
    e = [0.0]
    for i in reversed(range(len(w) - 1)):
        size = _norm(w[i + 1])
        gain = _norm(wA[i]) / size if size else 0.0
        e.append(_norm(b[i] + wA[i] - w[i]) + gain * e[-1])
    return math.hypot(*e)


def _states(w: States, L: int) -> list[Tensor]:
    """w_0 .. w_L as a list, from a list or a (longer) tensor; None becomes a scalar zero."""
    return [torch.zeros(()) if v is None else v for v in list(w)[: L + 1]]


def _norm(*states: Tensor) -> float:
    norms = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in states)
    return math.hypot(*norms)
