"""Tensors inside a layer that other code may hold, and whose gradients it may look at."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils import _pytree as pytree

from highway_bp.surroundings import modules_of


class Look(NamedTuple):
    """A tensor that other code may look at, and the dictionary of its hooks, which outlives it."""

    tensor: weakref.ref
    hooks: dict


Shown = list[Look]
_OF_ALL_MODULES = vars(nn.Module()).keys()  # no tensors of a forward pass


@contextlib.contextmanager
def shown_by(module: nn.Module) -> Iterator[Shown]:
    """While ``module`` runs, collect its shown tensors: those given to hooks, and attributes."""
    shown: Shown = []
    modules = modules_of(module)

    def note(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        add_shown(shown, pytree.tree_leaves((args, kwargs, out)))

    of_all = _global_forward_hooks or _global_forward_pre_hooks
    hooked = (m for m in modules if of_all or m._forward_hooks or m._forward_pre_hooks)
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in hooked]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()
    for m in modules:
        for name in vars(m).keys() - _OF_ALL_MODULES:
            if isinstance(value := vars(m)[name], Tensor | list | tuple | dict):
                add_shown(shown, _tensors_in(value))


def _tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or those in lists, tuples and dictionaries, which may contain themselves."""
    found, seen, rest = [], set(), [value]
    while rest:
        one = rest.pop()
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple | dict) and id(one) not in seen:
            seen.add(id(one))
            rest += one.values() if isinstance(one, dict) else one
    return found


def add_shown(shown: Shown, values: Iterable[Any]) -> None:
    inner = (t for t in values if isinstance(t, Tensor) and t.grad_fn is not None)
    shown += [Look(weakref.ref(t), hooks_of(t)) for t in inner]


def hooks_of(t: Tensor) -> dict:
    """The dictionary of the hooks on t, and of those that are added later."""
    t.register_hook(lambda _: None).remove()
    return t._backward_hooks


def retained(shown: Shown) -> list[Tensor]:
    """The shown tensors with `retain_grad`, each once."""
    alive = (t for look in shown if (t := look.tensor()) is not None)
    return list({id(t): t for t in alive if t.retains_grad}.values())


def check_shown(shown: Shown, hooks_of_extras: list[dict], name: str, is_used: bool) -> None:
    """Raise RuntimeError where somebody looks at a gradient that a chain cannot give in full.

    A hook would see one part of the gradient per iteration. The solve does not cover a tensor that
    a layer was given (by an earlier layer, too), or whose graph autograd has used up.

    Args:
        shown: tensors inside the layer, or given to it.
        hooks_of_extras: of what the layer has returned beside its state.
        is_used: whether autograd itself goes through the layer's graph, and frees it.
    """
    hooked = any([*(look.hooks for look in shown), *hooks_of_extras])
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
