"""Hooks that run after a gradient was accumulated: Gate leads to more parameters than get one."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor


class _IfArrived:
    """Replaces a hook once: runs it if a gradient has arrived, and puts it back."""

    def __init__(self, hooks: dict, key: int, has_arrived: Callable[[], bool]):
        hook = hooks[key]
        self._hook: Callable = hook._hook if isinstance(hook, _IfArrived) else hook
        self._hooks, self._key, self._has_arrived = hooks, key, has_arrived

    def __call__(self, p: Tensor) -> None:
        if self._key in self._hooks:  # else it was removed since
            self._hooks[self._key] = self._hook
        if self._has_arrived():
            self._hook(p)


def only_where_gradients_arrive(
    parameters: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """Keep post-accumulate hooks of parameters without a gradient from running in this backward
    pass, unless another path brings one. Autograd runs these hooks for none, too: they would act on
    an old .grad.

    grads: what the parameters get from here; None for none.
    """
    for p, g in zip(parameters, grads, strict=True):
        hooks = getattr(p, "_post_accumulate_grad_hooks", None)
        if hooks and g is None and torch._C._will_engine_execute_node(_accumulation(p)):
            # Asked once, before the first of the hooks, which may change .grad.
            has_arrived = cache(partial(_has_changed, p, p.grad, _version(p.grad)))
            for key in hooks:
                hooks[key] = _IfArrived(hooks, key, has_arrived)


def _accumulation(p: Tensor) -> object:
    return torch.autograd.graph.get_gradient_edge(p).node


def _has_changed(p: Tensor, before: Tensor | None, version: int | None) -> bool:
    return p.grad is not before or _version(p.grad) != version


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version
