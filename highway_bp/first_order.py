"""Refuse what gradients solved by a method lack: second derivatives, torch.func transforms."""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction


def first_order(backward: Callable) -> Callable:
    """Decorate the ``backward`` of an autograd function whose gradients have no graph of their own.

    It then refuses ``create_graph=True``. ``once_differentiable`` does so only if the cotangents
    need a gradient; else a second derivative through the function's inputs would silently be zero.
    Batched cotangents (``is_grads_batched``, ``vectorize=True``) and compiled autograd are refused
    as well.
    """

    @functools.wraps(backward)
    def checked(ctx, *cotangents):
        if not isinstance(ctx, BackwardCFunction):
            raise RuntimeError(
                "compiled autograd through a chain of layers; expected autograd's own backward "
                "pass, or Backprop()"
            )
        if any("Batched" in repr(torch._C._dispatch_keys(b)) for b in cotangents if b is not None):
            raise RuntimeError(
                "batched gradients (is_grads_batched, vectorize=True) through a chain of layers; "
                "expected one after the other, or Backprop()"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True through a chain whose gradient is solved by a method; its "
                "gradient has no second derivative: use Backprop() for this call"
            )
        return backward(ctx, *cotangents)

    return staticmethod(checked)


def refuse_transforms(name: str) -> None:
    """Raise RuntimeError within ``torch.func.grad``, ``vmap``, forward-mode derivatives."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name} in a transform of torch.func or a forward-mode derivative; expected "
            "Backprop() there"
        )
