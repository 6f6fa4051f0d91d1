"""Layers that have no residual connection are told of, once."""

from __future__ import annotations

import statistics
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from highway_bp.module_system import ModuleSystem

CANCELLED = 0.95  # share of the carry that the block takes away again
ELEMENTS = 256  # a random probe of fewer says little


def warn_without_residual(system: ModuleSystem) -> None:
    """Warn where most blocks cancel the carry they are said to have: there is no such carry.

    Costs one product with every block.
    """
    gammas = [
        gamma
        for gamma, h in zip(system.probe_gammas(), system.outputs, strict=True)
        if h.numel() >= ELEMENTS
    ]
    if gammas and statistics.median(gammas) > CANCELLED:
        warnings.warn(
            "the layers of this chain seem to have no residual connection: their blocks take "
            f"{statistics.median(gammas):.0%} of the carry away again, so a small k finds little "
            "of the gradient; expected layers h -> h + block(h), or a carry(h_in, h_out) that fits",
            stacklevel=2,
        )
