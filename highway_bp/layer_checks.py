"""Checks of layers: their residual paths, and what their backward passes add to the gradient."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from highway_bp.module_system import ModuleSystem
    from highway_bp.segment import Segment

CANCELLED = 0.95  # share of the carry that the block cancels
ELEMENTS = 256  # a random probe with fewer elements says little


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
