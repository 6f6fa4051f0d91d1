"""Tensors that a user's cell keeps as attributes: a loss on them is refused.

The cell runs without a graph, so the gradient of such a loss would be missing, in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn

from highway_bp.surroundings import kept_buffers

Attributes = dict[tuple[nn.Module, str], tuple[Tensor, int]]  # each with its version


def attributes(cell: nn.Module) -> Attributes:
    """The floating tensors among the attributes of the cell's modules; no parameters or buffers."""
    return {
        (module, name): (value, value._version)
        for module in cell.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def refuse_losses(cell: nn.Module, before: Attributes) -> None:
    """Let a backward pass raise RuntimeError at tensors that the cell has kept since ``before``."""
    for (module, name), (value, version) in attributes(cell).items():
        old, old_version = before.get((module, name), (None, 0))
        if not value.requires_grad and (value is not old or version != old_version):
            where = f"{type(cell).__name__} keeps {name}"
            setattr(module, name, _Kept.apply(value, torch.zeros((), requires_grad=True), where))


@contextlib.contextmanager
def restored(cell: nn.Module) -> Iterator[None]:
    """Restore the cell's buffers, and the tensors that it keeps, on exit."""
    before = attributes(cell)
    with kept_buffers(cell):
        yield
    for (module, name), (value, _) in before.items():
        setattr(module, name, value)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, leaf: Tensor, where: str) -> Tensor:
        ctx.where = where
        return value.view_as(value)

    @staticmethod
    def backward(ctx, g: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{ctx.where}, and a loss uses it; expected it as a part of the state, or Backprop()"
        )
