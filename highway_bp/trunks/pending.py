"""`Pending`: what a model's loop holds between layers that have not been run yet."""

from __future__ import annotations

import torch
from torch import Tensor

_KNOWN = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}
_ASKS = {Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.get_device}


class Pending(Tensor):
    """A state of known shape, dtype and device whose values are not there: using them raises."""

    @staticmethod
    def like(h: Tensor) -> Pending:
        return Tensor._make_subclass(Pending, h.detach(), h.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        getter = getattr(getattr(func, "__self__", None), "__name__", None)
        if func in _ASKS or getter in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__iter__):
            raise TypeError(
                "the model takes what a layer of its trunk returned apart; expected layers that "
                "return the state alone (transformers 5.0 or newer has such)"
            )
        raise RuntimeError(
            "the model uses the state between two layers of its trunk, which run together later; "
            "expected code that hands it from layer to layer unchanged: use Backprop() for this "
            "call, or forward hooks on the layers"
        )
