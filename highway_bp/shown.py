"""Tensors inside a layer that other code may hold, and whose gradients it may look at."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.surroundings import modules_of

Shown = list[weakref.ref]
_LISTS = list, tuple
_OF_ALL_MODULES = vars(nn.Module()).keys()  # no tensors of a forward pass


@contextlib.contextmanager
def shown_by(module: nn.Module) -> Iterator[Shown]:
    """While ``module`` runs, collect its shown tensors: those given to hooks, and attributes."""
    shown: Shown = []
    modules = modules_of(module)

    def note(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        add_shown(shown, pytree.tree_leaves((args, kwargs, out)))

    hooked = (m for m in modules if m._forward_hooks or m._forward_pre_hooks)
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in hooked]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()
    for m in modules:
        for name in vars(m).keys() - _OF_ALL_MODULES:
            value = vars(m)[name]
            if isinstance(value, _LISTS):
                add_shown(shown, value)
            elif isinstance(value, dict):
                add_shown(shown, value.values())
            elif isinstance(value, Tensor):
                add_shown(shown, [value])


def add_shown(shown: Shown, values: Iterable[Any]) -> None:
    shown += [weakref.ref(t) for t in values if isinstance(t, Tensor) and t.grad_fn is not None]


def alive(shown: Shown) -> list[Tensor]:
    return [t for ref in shown if (t := ref()) is not None]


def retained(shown: Shown) -> list[Tensor]:
    """The shown tensors with `retain_grad`, each once."""
    return list({id(t): t for t in alive(shown) if t.retains_grad}.values())


def check_shown(shown: Shown, extras: Shown, name: str, is_used: bool) -> None:
    """Raise RuntimeError where somebody looks at a gradient that a chain cannot give in full.

    A hook would see one part of the gradient per iteration. The solve does not cover a tensor that
    a layer was given (by an earlier layer, too), or whose graph autograd has used up.

    Args:
        shown: tensors inside the layer, or given to it.
        extras: what the layer has returned beside its state; these may have `retain_grad`.
        is_used: whether autograd itself goes through the layer's graph, and frees it.
    """
    hooked = any(t._backward_hooks for t in alive([*shown, *extras]))
    if hooked or any(is_used or hasattr(t.grad_fn, "one_pass") for t in retained(shown)):
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
