"""A layer that is run as residual(h, block(h)) must have the carry that its residual path has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from highway_bp.segment import Segment

TOLERANCE = 0.02  # relative; half precision stays below, another carry far above


def check_split(segment: Segment) -> None:
    """Compare z K with the vector-Jacobian product through the residual path alone, random z.

    With the residual path cut, nothing else would ever see it: a wrong K gives a wrong gradient
    at every k, k = L included. Costs no pass through the block.

    Raises:
        ValueError: naming the layer, when they differ.
    """
    if not segment.split:
        return
    (layer,), (name,), h = segment.layers, segment.names, segment.h_in.detach().requires_grad_()
    with torch.enable_grad():
        out = layer.residual(h, segment.z.detach())
    generator = torch.Generator(out.device).manual_seed(0)  # leaves the global stream alone
    z = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
    given = segment.K.vecmat(z)
    found = _through(out, h, z)
    if torch.linalg.vector_norm(given - found) > TOLERANCE * torch.linalg.vector_norm(found):
        has = "its carry is another" if hasattr(layer, "carry") else "it has no carry"
        raise ValueError(
            f"{name}: the residual path of residual(h, z) is not the identity, and {has}; expected "
            "carry(h_in, h_out) to return the Jacobian of residual in h, or a layer without block "
            "and residual"
        )


def _through(out: Tensor, h: Tensor, z: Tensor) -> Tensor:
    if not out.requires_grad:
        return torch.zeros_like(h)
    (v,) = torch.autograd.grad(out, h, z, allow_unused=True)
    return torch.zeros_like(h) if v is None else v
