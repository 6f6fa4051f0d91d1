"""Checks that a chain makes once: the carry of split layers, residual paths, layers for MGRIT."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from highway_bp.carry import as_carry
from highway_bp.surroundings import kept_buffers, kept_random_state

if TYPE_CHECKING:
    from highway_bp.layer_call import Ran
    from highway_bp.module_system import ModuleSystem
    from highway_bp.segment import Segment

_checked: WeakSet[nn.Module] = WeakSet()  # layers whose carry was compared
TOLERANCE = 0.02  # relative; errors of half precision are below, those of a wrong carry far above
CANCELLED = 0.95  # share of the carry that the block cancels
ELEMENTS = 256  # a random probe with fewer elements says little


def check_split(layer: nn.Module, name: str, h: Tensor, ran: Ran) -> None:
    """Compare w K with the vector-Jacobian product through the residual path alone, for random w.

    The residual path is cut, so nothing else would reveal a wrong K: the gradient would be wrong
    at every k, k = L included. The check costs no pass through the block, and is made
    once for every layer.

    Raises:
        ValueError: the two differ; the message names the layer.
    """
    if h.is_meta or layer in _checked:
        return
    h, z = h.detach().requires_grad_(), ran.z.detach()
    with (
        kept_buffers(layer),
        kept_random_state(h.device),
        saved_tensors_hooks(_same, _same),  # not those of checkpointing
        torch.enable_grad(),
    ):
        out = layer.residual(h, z)
        given = None if ran.carry is None else ran.carry(h.detach(), out.detach())
    generator = torch.Generator(out.device).manual_seed(0)  # leaves the global stream alone
    w = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
    found, expected = as_carry(given, out, name).vecmat(w), _through(out, h, w)
    if torch.linalg.vector_norm(found - expected) > TOLERANCE * torch.linalg.vector_norm(expected):
        wrong = "its carry is not the Jacobian of residual(h, z) in h"
        if ran.carry is None:
            wrong = "it has no carry, but the Jacobian of residual(h, z) in h is not the identity"
        raise ValueError(
            f"{name}: {wrong}; expected carry(h_in, h_out) to return this Jacobian, or a layer "
            "with a forward pass of its own"
        )
    _checked.add(layer)


def _same(t: Tensor) -> Tensor:
    return t


def _through(out: Tensor, h: Tensor, w: Tensor) -> Tensor:
    if not out.requires_grad:
        return torch.zeros_like(h)
    (v,) = torch.autograd.grad(out, h, w, allow_unused=True)
    return torch.zeros_like(h) if v is None else v


def refuse_affine(segments: Sequence[Segment], why: str) -> None:
    """Refuse layers whose backward pass adds something to the gradient, as an auxiliary loss does.

    Several products with one graph each contain what it adds.

    Raises:
        RuntimeError: a layer's vector-Jacobian product of zero is a number other than zero (nan
            comes from values that are not finite).
    """
    for segment in segments:
        v = segment.vjp(torch.zeros_like(segment.h_out))
        if v is not None and not v.is_meta and has_nonzero(v):
            raise RuntimeError(
                f"{segment.calls[0].layer.name} adds to the gradient in its backward pass (a loss "
                f"of its own?), which would be counted repeatedly with {why}; expected Backprop()"
            )


def has_nonzero(v: Tensor) -> bool:
    """Whether v has another number than 0; nan is none."""
    return not ((v == 0) | v.isnan()).all()


def warn_without_residual(system: ModuleSystem) -> None:
    """Warn if most blocks cancel their layer's carry: the layers have no such residual path.

    The check costs one product with every block. On the meta device nothing is checked.
    """
    outputs = [segment.h_out for segment in system.segments]
    if outputs[0].is_meta:
        return
    found = zip(outputs, system.estimate(probes=1, seed=0), strict=True)
    gammas = [gamma for h, gamma in found if h.numel() >= ELEMENTS]
    if gammas and statistics.median(gammas) > CANCELLED:
        warnings.warn(
            "the layers of this chain seem to have no residual connection: their blocks cancel "
            f"{statistics.median(gammas):.0%} of the carry, so a small k gives a poor gradient; "
            "expected layers h -> h + block(h), or a carry(h_in, h_out) that fits",
            stacklevel=2,
        )
