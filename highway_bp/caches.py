"""Key-value caches among the arguments of layers: objects that every layer writes into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def is_cache(value: object) -> bool:
    """Whether ``value`` is a cache of transformers, or looks like one."""
    return not isinstance(value, Tensor | type) and hasattr(value, "get_seq_length")


def is_filled(cache: Any) -> bool:
    """Whether the cache holds states: floating tensors, unlike a sliding window's length."""
    return any(t.is_floating_point() for _, _, t in held_tensors(vars(cache)))


def without_caches(tree: Any) -> Any:
    """``tree`` with None for every cache: a layer that runs again would write into it twice."""
    flat, spec = pytree.tree_flatten(tree, is_leaf=is_no_container)
    if not any(map(is_cache, flat)):
        return tree
    return pytree.tree_unflatten([None if is_cache(v) else v for v in flat], spec)


def held_tensors(value: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """(container, key, tensor) of all tensors that a cache holds, given its ``vars``."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, Tensor):
            yield value, key, inner
        elif isinstance(inner, list | dict):
            yield from held_tensors(inner)
        elif hasattr(inner, "__dict__") and not callable(inner):
            yield from held_tensors(vars(inner))


def is_no_container(value: object) -> bool:
    """Whether ``value`` is one object, as a cache is: only plain containers are opened."""
    return type(value) not in (tuple, list, dict)
