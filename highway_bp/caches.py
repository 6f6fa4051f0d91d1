"""Key-value caches among the arguments of layers: objects that every layer writes into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def is_cache(value: object) -> bool:
    """Whether ``value`` is a cache of transformers, or looks like one."""
    return not isinstance(value, Tensor | type) and hasattr(value, "get_seq_length")


def is_filled(cache: Any) -> bool:
    """Whether the cache holds states: floating tensors, unlike a sliding window's length."""
    return any(t.is_floating_point() for _, _, t in held_tensors(vars(cache)))


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
