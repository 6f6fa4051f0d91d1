"""Checks of layers: their residual paths, and what their backward passes add to the gradient."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from highway_bp.segment import Segment, gradients
from highway_bp.silenced import silenced
from highway_bp.surroundings import random_state

if TYPE_CHECKING:
    from highway_bp.module_system import ModuleSystem

CANCELLED = 0.95  # share of the carry that the block cancels
MIN_ELEMENTS = 256  # an estimate from fewer says little
STRETCH = 1024.0  # factor on the cotangent in the test for clipping


def refuse_unrepeatable(
    name: str, output: Tensor, inputs: Sequence[Tensor], buffers: Sequence[Tensor] | None
) -> None:
    """Refuse a graph whose backward pass cannot run twice; a method runs it several times.

    A custom function may write into what it has saved, as some fused kernels do, into buffers, or
    draw random numbers. A hook may remove itself. Autograd notices none of these.

    Args:
        name: of the layer; ``inputs``: those of its graph, whose gradients are compared.
        buffers: of a layer with custom functions, compared as the random state is; None: neither
            is compared (other threads may draw random numbers).

    Raises:
        RuntimeError: two products of ``output`` with one random w are different, or fail, or change
            ``buffers`` or the random state.
    """
    if not has_numbers(output):
        return

    def watched() -> list[Tensor | None]:
        return [] if buffers is None else [*random_state(output.device), *buffers]

    before = [None if t is None else t.clone() for t in watched()]
    w, why, hooks = probe(output), None, [t._backward_hooks for t in inputs]
    with silenced(hooks):
        first = gradients([(output, w.clone())], inputs)
        first = [None if g is None else g.clone() for g in first]  # the function may keep its own
        try:
            again = gradients([(output, w.clone())], inputs)
        except Exception as error:  # it has freed what it saved, say
            why, again = error, first
    same = all(a is None or a.equal(b) for a, b in zip(watched(), before, strict=True))
    if why or not same or not _are_near(again, first):
        raise RuntimeError(
            f"the backward pass of {name} cannot run twice (a hook removes itself, or a custom "
            "function writes into what it has saved or into buffers, frees it, or draws random "
            "numbers?), and a method runs it several times; expected another one, or Backprop()"
        ) from why


def _are_near(again: Sequence[Tensor | None], first: Sequence[Tensor | None]) -> bool:
    """Whether each gradient agrees, up to 5 % of its norm and a thousandth of the norm of all, as
    kernels may change the order of sums. Sparse ones are left out."""
    pairs = [(a, b) for a, b in zip(again, first, strict=True) if b is not None]
    if any(a is None for a, _ in pairs):
        return False
    pairs = [(a, b) for a, b in pairs if b.layout is torch.strided]
    norms = [torch.linalg.vector_norm(b).double() for _, b in pairs]
    whole = sum(norm**2 for norm in norms) ** 0.5
    errors = [torch.linalg.vector_norm(a - b).double() for a, b in pairs]
    return not any(e > 0.05 * n + 1e-3 * whole for e, n in zip(errors, norms, strict=True))


def refuse_nonlinear(segments: Sequence[Segment], why: str) -> None:
    """Refuse layers whose backward pass adds something to the gradient, as an auxiliary loss does,
    or clips it, where several products of one graph are added.

    Raises:
        RuntimeError: a layer's vector-Jacobian product of zero is not zero (nan does not count: it
            comes from values that are not finite), or the product is not linear in its vector.
    """
    for segment in segments:
        name, v = segment.calls[0].layer.name, segment.vjp(torch.zeros_like(segment.h_out))
        if v is None or not has_numbers(v):
            continue
        if has_nonzero(v):
            raise RuntimeError(
                f"{name} adds to the gradient in its backward pass (a loss of its own?), which "
                f"would be counted repeatedly with {why}; expected Backprop()"
            )
        block = partial(segment.through, block=1, carry=0)  # J alone: in J + K, K may hide it
        w = probe(segment.h_out)
        carried = segment.through(w, block=0, carry=1)  # w J = w (J + K) - w K has its rounding
        rounding = 10 * torch.finfo(w.dtype).eps * torch.linalg.vector_norm(carried)
        is_wide = w.dtype.itemsize >= 4  # numbers of half precision may overflow
        looked_for = is_wide or segment.functions
        if looked_for and not is_linear(block, w, 0.05 if is_wide else 0.25, rounding):
            raise RuntimeError(
                f"{name} clips the gradient in its backward pass, which would happen to parts of "
                f"it with {why}; expected Backprop()"
            )


def is_linear(
    product: Callable[[Tensor], Tensor | None],
    w: Tensor,
    tolerance: float,
    rounding: Tensor | float = 0.0,
) -> bool:
    """Whether product(c w) = c product(w) and product(u + w) = product(u) + product(w).

    Args:
        tolerance: of the difference, relative to the norm; ``rounding`` is added to it. A product
            that is not finite, as it may be under autocast, is not judged.
    """
    v, stretched, other = product(w.clone()), product(w * STRETCH), w.flip(0) * 3
    if v is None:
        return True
    both, of_other = product(w + other), product(other)
    pairs = (stretched / STRETCH, v), (both, v + of_other)
    norm = torch.linalg.vector_norm
    return not any(tolerance * norm(b) + rounding < norm(a - b) < math.inf for a, b in pairs)


def probe(like: Tensor) -> Tensor:
    """Random numbers that leave the global stream alone."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def has_numbers(t: Tensor) -> bool:
    """Whether there is something to check: not on the meta device, nor with fake tensors."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def has_nonzero(v: Tensor) -> bool:
    """Whether v has another number than 0; nan is none."""
    return not ((v == 0) | v.isnan()).all()


def warn_without_residual(system: ModuleSystem) -> None:
    """Warn if most blocks cancel their layer's carry: the layers have no such residual path.

    The check costs one product with every block.
    """
    outputs = [segment.h_out for segment in system.segments]
    if not has_numbers(outputs[0]):
        return
    found = zip(outputs, system.estimate(probes=1, seed=0), strict=True)
    gammas = [gamma for h, gamma in found if h.numel() >= MIN_ELEMENTS]
    if gammas and statistics.median(gammas) > CANCELLED:
        warnings.warn(
            "the layers of this chain seem to have no residual connection: their blocks cancel "
            f"{statistics.median(gammas):.0%} of the carry, so a small k gives a poor gradient; "
            "expected layers h -> h + block(h), or a carry(h_in, h_out) that fits",
            stacklevel=2,
        )
