"""What the sublayers of all transformers share: f(h) = h + Block(h), split after each."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from highway_bp.carry import Carry, Diagonal, Product

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class Opaque(nn.Module):
    """A whole layer that a user named: h -> h + something, carry as the layer says (or I)."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.index = layer, index
        if hasattr(layer, "carry"):
            self.carry = layer.carry

    def _get_name(self) -> str:
        return type(self.layer).__name__  # what errors call it

    def forward(self, h: Tensor, calls: list) -> Tensor:
        args, kwargs = calls[self.index]
        return self.layer(h, *args, **kwargs)


def opaque(layer: nn.Module, index: int) -> list[nn.Module]:
    return [Opaque(layer, index)]


class Sublayer(nn.Module, ABC):
    """Pre-LN: f(h) = h + Block(h), K = I (paper, Table 1). Subclasses define ``inner``.

    Args:
        layer: the layer of transformers that this is a part of; its modules are looked up anew
            in every call, so that they may be exchanged (LoRA).
        index: the layer's place in the trunk.
    """

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.index = layer, index

    @abstractmethod
    def inner(self, h: Tensor, **arguments: Any) -> Tensor:
        """Block(h), ``arguments`` being those of the layer's own forward."""

    def block(self, h: Tensor, calls: list) -> Tensor:
        arguments = call_arguments(self.layer, calls[self.index])
        if not (getattr(self.layer, "gradient_checkpointing", False) and self.layer.training):
            return self.inner(h, **arguments)
        arguments |= {name: None for name in CACHES if name in arguments}
        checkpoint = self.layer._gradient_checkpointing_func
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True; expected "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )
        return checkpoint(partial(self.inner, **arguments), h)

    def residual(self, h: Tensor, z: Tensor) -> Tensor:
        return h + z

    def forward(self, h: Tensor, calls: list) -> Tensor:
        return self.residual(h, self.block(h, calls))


class PostLN(Sublayer):
    """f(h) = LN(h + Block(h)), K = diag(weight / sigma), sigma that of h + Block(h).

    Subclasses also define ``norm``, the LayerNorm.
    """

    residual = None  # the residual path is no function of h and Block(h) alone: a is part of z

    @property
    @abstractmethod
    def norm(self) -> nn.LayerNorm:
        """The one behind the sum."""

    def with_carry(self, h: Tensor, calls: list) -> tuple[Tensor, Carry]:
        u = self.block(h, calls) + h
        return self.norm(u), post_ln_carry(u, self.norm)

    def forward(self, h: Tensor, calls: list) -> Tensor:
        return self.norm(self.block(h, calls) + h)


@torch.no_grad()
def post_ln_carry(u: Tensor, norm: nn.LayerNorm) -> Carry:
    """diag(weight / sigma) of LN(u), u (..., d); sigma over the last dimension, in float32."""
    wide = u.detach()
    wide = wide.float() if wide.dtype.itemsize < 4 else wide
    inverse_sigma = (wide.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt().to(u.dtype)
    factors = [Diagonal(inverse_sigma)]
    if norm.weight is not None:
        factors.append(Diagonal(norm.weight.detach()))
    return Product(factors)


def call_arguments(layer: nn.Module, call: tuple[tuple, dict]) -> dict[str, Any]:
    """A layer's arguments but the state, by name, as its own forward would see them."""
    args, kwargs = call
    names, extra = _parameters(type(layer))
    found = dict(zip(names, args, strict=False)) | kwargs
    return found if extra else {name: found[name] for name in found if name in names}


@lru_cache
def _parameters(cls: type) -> tuple[tuple[str, ...], bool]:
    parameters: Mapping = inspect.signature(cls.forward).parameters
    names = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    return names[2:], any(p.kind is p.VAR_KEYWORD for p in parameters.values())
