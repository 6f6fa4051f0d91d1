"""Layers whose backward pass itself writes the gradients of parameters, as fused kernels do.

A method runs a layer's backward pass several times, so such a layer would add them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from highway_bp.surroundings import parameters_of

if TYPE_CHECKING:
    from highway_bp.layer_call import Layer
    from highway_bp.segment import Segment

Found = list[tuple[str, Tensor | None, int | None]]  # layer, gradient, its version


def layers_with_functions(segments: Sequence[Segment]) -> list[Layer]:
    """The layers with custom functions among the nodes of their segment's graph."""
    return [call.layer for s in segments if s.has_functions for call in s.calls]


def own_gradients(layers: Sequence[Layer]) -> Found:
    """The gradients that the layers' parameters have now: their .grad, Megatron's .main_grad."""
    return [
        (layer.name, g, None if g is None else g._version)
        for layer in layers
        for p in parameters_of(layer.module)
        for g in ((p.grad if p.is_leaf else None), getattr(p, "main_grad", None))
    ]


def check_own_gradients(before: Found, now: Found) -> None:
    """Raise RuntimeError where a gradient is another one now."""
    for (name, old, version), (_, new, new_version) in zip(before, now, strict=True):
        if old is not new or version != new_version:
            raise RuntimeError(
                f"the backward pass of {name} writes the gradients of parameters itself, and a "
                "method runs it several times; expected gradient accumulation that is not fused, "
                "or Backprop()"
            )
