"""Tensors inside a layer that somebody else may hold, and look at the gradient of."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Shown = list[weakref.ref]


@contextlib.contextmanager
def shown_by(module: nn.Module) -> Iterator[Shown]:
    """While ``module`` runs, collect what it shows: to hooks on its modules, and as attributes."""
    shown: Shown = []
    modules = list(module.modules())

    def note(_: nn.Module, __: tuple, out: Any) -> None:
        add_shown(shown, pytree.tree_leaves(out))

    handles = [m.register_forward_hook(note) for m in modules if m._forward_hooks]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()
    for m in modules:
        add_shown(shown, vars(m).values())


def add_shown(shown: Shown, values: Iterable[Any]) -> None:
    shown += [weakref.ref(t) for t in values if isinstance(t, Tensor) and t.grad_fn is not None]


def check_shown(shown: Shown, name: str) -> None:
    """Raise RuntimeError where somebody looks at the gradient of one of these tensors.

    A chain sends its gradient through them in several parts, one for every iteration.
    """
    for t in (ref() for ref in shown):
        if t is not None and (t.retains_grad or t._backward_hooks):
            raise RuntimeError(
                f"a hook or retain_grad on a tensor inside {name}, whose gradient a chain brings "
                "in parts; expected one on the layer's state, or Backprop()"
            )
