"""`gradient_error`: how far a method's gradient is from the exact one, on a user's own model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highway_bp.method_state import chains
from highway_bp.methods import Backprop, Highway, Method
from highway_bp.set_method import current_method, set_method


@dataclass(frozen=True)
class GradientError:
    """Of one k: over all parameters together, and ``parameters`` by name (cosine, error).

    cosine: between the approximate and the exact gradient; relative_error: norm of their
    difference over the exact gradient's. Where the exact gradient is zero, both are nan.
    """

    k: int
    cosine: float
    relative_error: float
    parameters: dict[str, tuple[float, float]]


def gradient_error(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    ks: Iterable[int] = range(6),
    method: Method | None = None,
) -> list[GradientError]:
    """The error of ``method`` at every k, against backpropagation (paper, Figure 6, top).

    Args:
        model: has a `ResidualChain`, a recurrent layer of this library or a converted trunk; its
            method, gradients and random state are afterwards what they were. Running statistics
            (batch normalisation) see the batch len(ks) + 1 times.
        loss_fn: ``loss_fn(model)`` runs the model on a batch and returns a scalar loss. Every
            call sees the same random numbers (dropout).
        ks: numbers of iterations.
        method: `Highway` (the default) or `FixedPoint` with any k, which is replaced.

    Raises:
        ValueError: the model has nothing that takes a method, or the method has no k.
    """
    method = Highway(0) if method is None else method
    if not hasattr(method, "k"):
        raise ValueError(f"method={method}; expected one with iterations, such as Highway(0)")
    before, memory = current_method(model), [c.gammas.state_dict() for c in chains(model)]
    try:
        exact = _gradients(model, loss_fn, Backprop())
        found = []
        for k in ks:
            approximate = _gradients(model, loss_fn, dataclasses.replace(method, k=k))
            found.append(_compare(k, approximate, exact))
    finally:
        set_method(model, before)
        for chain, state in zip(chains(model), memory, strict=True):
            chain.gammas.load_state_dict(state)
    return found


def _gradients(model: nn.Module, loss_fn, method: Method) -> dict[str, Tensor]:
    set_method(model, method)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    devices = {p.device for p in named.values() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"k=\d+ is larger than L=")
        grads = torch.autograd.grad(loss_fn(model), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def _compare(k: int, found: dict[str, Tensor], exact: dict[str, Tensor]) -> GradientError:
    sums = {}
    for name, g in exact.items():
        e, f = g.double(), found.get(name, torch.zeros_like(g)).double()
        sums[name] = torch.stack(
            [torch.sum(e * f), torch.sum(e * e), torch.sum(f * f), torch.sum((f - e) ** 2)]).cpu()
    total = torch.stack(list(sums.values())).sum(0)
    return GradientError(k, *_scores(total), {name: _scores(s) for name, s in sums.items()})


def _scores(sums: Tensor) -> tuple[float, float]:
    dot, exact, found, difference = sums
    return (dot / (exact * found).sqrt()).item(), (difference / exact).sqrt().item()
