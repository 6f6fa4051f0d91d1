"""A backward pass that cannot be differentiated itself says so."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def first_order(backward: Callable) -> Callable:
    """For the ``backward`` of an autograd function whose gradients have no graph of their own.

    Unlike ``once_differentiable`` it also refuses where the cotangents need no gradient: a second
    derivative through the function's inputs would silently be zero.
    """

    @functools.wraps(backward)
    def checked(ctx, *cotangents):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True through a chain whose gradient is solved by a method; its "
                "gradient has no second derivative: use Backprop() for this call"
            )
        return backward(ctx, *cotangents)

    return staticmethod(checked)
