"""Tensors inside a layer that other code may hold, and whose gradients it may look at."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.surroundings import modules_of

Shown = list[weakref.ref]
_OF_ALL_MODULES = vars(nn.Module()).keys()  # no tensors of a forward pass


@contextlib.contextmanager
def shown_by(module: nn.Module) -> Iterator[Shown]:
    """While ``module`` runs, collect its shown tensors: outputs given to hooks, and attributes."""
    shown: Shown = []
    modules = modules_of(module)

    def note(_: nn.Module, __: tuple, out: Any) -> None:
        add_shown(shown, pytree.tree_leaves(out))

    handles = [m.register_forward_hook(note) for m in modules if m._forward_hooks]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()
    add_shown(shown, (vars(m)[name] for m in modules for name in vars(m).keys() - _OF_ALL_MODULES))


def add_shown(shown: Shown, values: Iterable[Any]) -> None:
    shown += [weakref.ref(t) for t in values if isinstance(t, Tensor) and t.grad_fn is not None]


def retained(shown: Shown) -> list[Tensor]:
    """The shown tensors with `retain_grad`."""
    return [t for t in (ref() for ref in shown) if t is not None and t.retains_grad]


def check_shown(shown: Shown, name: str, is_used: bool) -> None:
    """Raise RuntimeError where somebody looks at a gradient that a chain cannot give in full.

    A hook would see one part of the gradient per iteration. The solve does not cover a tensor that
    a layer has returned beside its state, or whose graph autograd has used up.
    """
    for t in (ref() for ref in shown):
        if t is None:
            continue
        is_outside = is_used or "Tap" in t.grad_fn.name()
        if t._backward_hooks or (t.retains_grad and is_outside):
            raise RuntimeError(
                f"a hook or retain_grad on a tensor inside {name}, whose gradient a chain brings "
                "in parts; expected one on the layer's state, or Backprop()"
            )


@contextlib.contextmanager
def kept_grads(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the .grad of these tensors on exit."""
    before = [(t, t.grad) for t in tensors]
    try:
        yield
    finally:
        for t, grad in before:
            t.grad = grad
