"""Norms and gains of a chain's blocks and carries, as `bounds` needs them.

Over a batch, a state is the whole tensor: where the samples do not mix, its Jacobian's norm is the
largest of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from highway_bp.carry import Carry, Diagonal, Identity, Permutation, Product, RecordedMap, Scalar
from highway_bp.diagnostics.spectral import LinearMap, gain, spectral_norm
from highway_bp.module_system import ModuleSystem
from highway_bp.segment import Segment


@dataclass(frozen=True)
class LayerNorms:
    """Of the L layers: a_m, c_m, l_m as above; gains ||M||_F / sqrt(n) of the first two."""

    blocks: list[float]
    carries: list[float]
    layers: list[float]
    block_gains: list[float]
    carry_gains: list[float]


def block(segment: Segment, K: Carry, gamma: float) -> LinearMap:
    """w -> w (J + gamma K), differentiable in w while gradients are enabled."""

    def product(w: Tensor) -> Tensor:
        (v,) = (
            torch.autograd.grad(
                segment.h_out,
                segment.h_in,
                w,
                retain_graph=True,
                allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )
            if segment.h_out.requires_grad
            else (None,)
        )
        v = torch.zeros_like(segment.h_in) if v is None else v
        share = gamma if segment.split else gamma - 1
        return v + share * carried(K)(w) if share else v

    return product


def carried(K: Carry) -> LinearMap:
    """w -> w K, differentiable in w while gradients are enabled."""
    if isinstance(K, RecordedMap):
        return lambda w: torch.autograd.grad(
            K.y, K.x, w, retain_graph=True, create_graph=torch.is_grad_enabled()
        )[0]
    if not isinstance(K, Product):
        return K.vecmat

    def product(w: Tensor) -> Tensor:
        for factor in K.factors:
            w = carried(factor)(w)
        return w

    return product


def carry_norm(K: Carry, like: Tensor, generator: torch.Generator) -> float:
    """||K||, in closed form where K is a permutation or diagonal."""
    match K:
        case Identity() | Permutation():
            return 1.0
        case Scalar():
            return abs(float(K.s))
        case Diagonal():
            return K.d.abs().max().item()
    return spectral_norm(carried(K), like, generator)


def layer_norms(system: ModuleSystem, gammas: Sequence[float]) -> LayerNorms:
    """Norms and gains of a chain's layers; zeros below the first state that wants a gradient."""
    rows = []
    for i, (segment, gamma) in enumerate(zip(system.segments, gammas, strict=True)):
        if not segment.h_in.requires_grad:
            rows.append((0.0,) * 5)
            continue
        K, like = system.carry(i), segment.h_out.detach()
        generator = torch.Generator(like.device).manual_seed(i)  # leaves the global stream alone
        J, A = block(segment, K, gamma), block(segment, K, 1.0)
        rows.append(
            (
                spectral_norm(J, like, generator),
                abs(1 - gamma) * carry_norm(K, like, generator),
                spectral_norm(A, like, generator),
                gain(J, like, generator),
                abs(1 - gamma) * gain(carried(K), like, generator),
            )
        )
    return LayerNorms(*([*column] for column in zip(*rows, strict=True)))
