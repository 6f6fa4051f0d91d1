"""What a chain looks at once: the carry of split layers, and whether there are residual paths."""

from __future__ import annotations

import statistics
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from highway_bp.carry import as_carry

if TYPE_CHECKING:
    from highway_bp.layer_call import Ran
    from highway_bp.module_system import ModuleSystem

TOLERANCE = 0.02  # relative; half precision stays below, another carry far above
CANCELLED = 0.95  # share of the carry that the block takes away again
ELEMENTS = 256  # a random probe of fewer says little


def check_split(layer: nn.Module, name: str, h: Tensor, ran: Ran) -> None:
    """Compare z K with the vector-Jacobian product through the residual path alone, random z.

    With the residual path cut, nothing else would ever see it: a wrong K gives a wrong gradient
    at every k, k = L included. Costs no pass through the block.

    Raises:
        ValueError: naming the layer, when they differ.
    """
    if h.is_meta:
        return
    h, z = h.detach().requires_grad_(), ran.z.detach()
    with torch.enable_grad():
        out = layer.residual(h, z)
    generator = torch.Generator(out.device).manual_seed(0)  # leaves the global stream alone
    w = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
    given = None if ran.carry is None else ran.carry(h.detach(), out.detach())
    found, expected = as_carry(given, out, name).vecmat(w), _through(out, h, w)
    if torch.linalg.vector_norm(found - expected) > TOLERANCE * torch.linalg.vector_norm(expected):
        has = "it has no carry" if ran.carry is None else "its carry is another"
        raise ValueError(
            f"{name}: the residual path of residual(h, z) is not the identity, and {has}; expected "
            "carry(h_in, h_out) to return the Jacobian of residual in h, or a layer without block "
            "and residual"
        )


def _through(out: Tensor, h: Tensor, w: Tensor) -> Tensor:
    if not out.requires_grad:
        return torch.zeros_like(h)
    (v,) = torch.autograd.grad(out, h, w, allow_unused=True)
    return torch.zeros_like(h) if v is None else v


def refuse_affine(system: ModuleSystem) -> None:
    """MGRIT solves for errors; what a backward pass adds by itself would go into each of them.

    Raises:
        RuntimeError: a layer's vector-Jacobian product of zero is not zero.
    """
    for segment in system.segments:
        v = segment.vjp(torch.zeros_like(segment.h_out))
        if v is not None and not v.is_meta and not (v == 0).all():
            raise RuntimeError(
                f"{segment.calls[0].layer.name} adds to the gradient in its backward pass (a loss "
                "of its own?), which MGRIT would count repeatedly; expected Highway(k) or "
                "Backprop()"
            )


def warn_without_residual(system: ModuleSystem) -> None:
    """Warn where most blocks cancel the carry they are said to have: there is no such carry.

    Costs one product with every block. On the meta device there is nothing to look at.
    """
    if system.outputs[0].is_meta:
        return
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
