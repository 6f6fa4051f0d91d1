"""Layers whose backward pass itself writes the gradients of parameters, as fused kernels do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from highway_bp.surroundings import parameters_of

if TYPE_CHECKING:
    from highway_bp.layer_call import Layer


@contextlib.contextmanager
def refuse_own_gradients(layers: Sequence[Layer]) -> Iterator[None]:
    """Raise RuntimeError on exit if a gradient of the layers' parameters is another one then.

    A method runs a layer's backward pass several times: such a layer adds up all of them.
    """
    before = _gradients(layers)
    yield
    for (name, old, version), (_, new, new_version) in zip(before, _gradients(layers), strict=True):
        if old is not new or version != new_version:
            raise RuntimeError(
                f"the backward pass of {name} writes the gradients of parameters itself, and a "
                "method runs it several times; expected gradient accumulation that is not fused, "
                "or Backprop()"
            )


def _gradients(layers: Sequence[Layer]) -> list[tuple[str, Tensor | None, int | None]]:
    """(layer, gradient, its version): each parameter's .grad, and Megatron's .main_grad."""
    return [
        (layer.name, g, None if g is None else g._version)
        for layer in layers
        for p in parameters_of(layer.module)
        for g in ((p.grad if p.is_leaf else None), getattr(p, "main_grad", None))
    ]
