"""Hooks that run after a gradient was accumulated: Gate leads to more parameters than get one."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _IfArrived:
    """Replaces a hook on p once: runs it if the .grad of p has changed since, then puts it back."""

    def __init__(self, p: Tensor, hooks: dict, key: int):
        hook = hooks[key]
        self._hook: Callable = hook._hook if isinstance(hook, _IfArrived) else hook
        self._hooks, self._key, self._before = hooks, key, p.grad
        self._version = _version(p.grad)

    def __call__(self, p: Tensor) -> None:
        if self._key in self._hooks:  # else it was removed since
            self._hooks[self._key] = self._hook
        if p.grad is not self._before or _version(p.grad) != self._version:
            self._hook(p)


def only_where_gradients_arrive(parameters: Iterable[Tensor]) -> None:
    """Keep post-accumulate hooks of these parameters from running in this backward pass, unless
    another path brings a gradient. A chain has none for them, and autograd runs the hooks for none,
    too: they would act on an old .grad."""
    for p in parameters:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None)
        if hooks and torch._C._will_engine_execute_node(_accumulation(p)):
            for key in hooks:
                hooks[key] = _IfArrived(p, hooks, key)


def _accumulation(p: Tensor) -> object:
    return torch.autograd.graph.get_gradient_edge(p).node


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version
