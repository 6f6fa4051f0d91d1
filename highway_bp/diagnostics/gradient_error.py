"""`gradient_error`: how far a method's gradient is from the exact one, on a user's own model."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from highway_bp.check import whole_numbers
from highway_bp.diagnostics.gradients import gradients_of, unchanged
from highway_bp.methods import Backprop, Highway, Method
from highway_bp.parallel.owners import from_owners


@dataclass(frozen=True)
class GradientError:
    """For one k: the error over all parameters together, and by parameter and layer.

    Attributes:
        k: number of iterations.
        cosine: between the approximate and the exact gradient.
        relative_error: norm of their difference, divided by the exact gradient's norm.
        increment: norm of the change from the previous k (for the first k: from zero), divided by
            the exact gradient's norm. If that norm is zero, all three are nan.
        parameters, layers: (cosine, relative_error) by name; not printed.
    """

    k: int
    cosine: float
    relative_error: float
    increment: float
    parameters: dict[str, tuple[float, float]] = field(repr=False)
    layers: dict[str, tuple[float, float]] = field(repr=False)


def gradient_error(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    ks: Iterable[int] = range(6),
    method: Method | None = None,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> list[GradientError]:
    """The error of ``method`` at every k, against backpropagation (paper, Figure 6).

    All processes of a sharded model call it and get the same errors over all layers, to the bit.

        >>> model = nn.Sequential(hb.GRU(3, 4, method=hb.Highway(k=1)))
        >>> x = torch.randn(6, 2, 3)
        >>> errors = hb.gradient_error(model, lambda m: m(x)[0].square().mean(), ks=(0, 6))
        >>> errors[1].relative_error < 1e-5  # k = L
        True

    Args:
        model: has a `ResidualChain`, a recurrent layer of this library or a converted trunk; its
            method, gradients, buffers and random state are left unchanged.
        loss_fn: ``loss_fn(model)`` runs the model on a batch and returns a scalar loss. Every
            call sees the same random numbers (dropout).
        ks: numbers of iterations.
        method: `Highway` (the default) or `FixedPoint` with any k, which is replaced.
        mean: ``mean(gradient)`` averages over processes with other parts of the batch
            (`replicate`); it may write into the gradient.

    Returns:
        One `GradientError` per k, in the order of ``ks``.

    Raises:
        ValueError: nothing in the model has a method, no gradient goes through it, or the method
            has no k.
        TypeError, ValueError: a k is no whole number of at least 0; the loss is no scalar tensor
            with a gradient.
    """
    method = Highway(0) if method is None else method
    if not hasattr(method, "k"):
        raise ValueError(f"method={method}; expected one with iterations, such as Highway(0)")
    ks = whole_numbers("ks", ks, least=0)

    def gradients(method: Method) -> dict[str, Tensor]:
        own = gradients_of(model, loss_fn, method)
        if mean is None:
            return own
        copies = {name: g.clone(memory_format=torch.contiguous_format) for name, g in own.items()}
        return {name: mean(g) for name, g in copies.items()}

    found: list[GradientError] = []
    with unchanged(model):
        exact = gradients(Backprop())
        last: dict[str, Tensor] = {}
        for k in ks:
            approximate = gradients(dataclasses.replace(method, k=k))
            sums = from_owners(model, sums_of(approximate, last, exact))
            found.append(error_of(k, sums))
            last = approximate
    return found


def sums_of(
    found: dict[str, Tensor], last: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, Tensor]:
    """For every parameter with an exact gradient, the five sums that `_scores` needs."""
    sums: dict[str, Tensor] = {}
    for name, g in exact.items():
        f, before = (grads.get(name, torch.zeros_like(g)).double() for grads in (found, last))
        e = g.double()
        products = (e * f, e * e, f * f, (f - e) ** 2, (f - before) ** 2)
        sums[name] = torch.stack([product.sum() for product in products]).cpu()
    return sums


def error_of(k: int, sums: dict[str, Tensor]) -> GradientError:
    """The error at k, from the sums of all parameters."""
    by_layer: dict[str, Tensor] = {}
    for name, s in sums.items():
        layer = layer_name(name)
        by_layer[layer] = by_layer.get(layer, 0) + s
    parameters, layers = (
        {name: _scores(s)[:2] for name, s in named.items()} for named in (sums, by_layer)
    )
    return GradientError(k, *_scores(torch.stack([*sums.values()]).sum(0)), parameters, layers)


def layer_name(parameter: str) -> str:
    """A parameter's name up to its first number; without a number, all but its last part."""
    parts = parameter.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: first + 1])


def _scores(sums: Tensor) -> tuple[float, float, float]:
    """Cosine, relative error and increment."""
    dot, exact, found, difference, change = sums
    scores = dot / (exact * found).sqrt(), (difference / exact).sqrt(), (change / exact).sqrt()
    return tuple(score.item() for score in scores)
