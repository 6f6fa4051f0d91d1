"""Tuples, lists and dictionaries among the arguments of layers: what is in them, and other tensors
in its place. A key-value cache is one object."""

from __future__ import annotations

import copy
from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor

from highway_bp.caches import is_cache


def leaves(value: Any) -> list[Any]:
    """All that is in ``value`` and is no container itself."""
    items = _items(value)
    return [value] if items is None else [leaf for _, inner in items for leaf in leaves(inner)]


def exchanged(value: Any, others: dict[int, Tensor]) -> Any:
    """``value`` with other tensors for those of these ids.

    A layer may write into lists and dictionaries that it is given, for others to read: they stay
    the same objects.
    """
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    items = _items(value)
    if items is None:
        return value
    if isinstance(value, tuple):
        return _like(value, [exchanged(inner, others) for _, inner in items])
    for key, inner in items:
        value[key] = exchanged(inner, others)
    return value


def copied(value: Any, others: dict[int, Tensor]) -> Any:
    """The same in containers of its own; None for a cache, which a second run would fill twice."""
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    items = _items(value)
    if items is None:
        return None if is_cache(value) else value
    if isinstance(value, tuple):
        return _like(value, [copied(inner, others) for _, inner in items])
    new = value[:] if type(value) is list else {} if type(value) is dict else copy.copy(value)
    for key, inner in items:
        new[key] = copied(inner, others)
    return new


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, MutableMapping) and not is_cache(value):
        return list(value.items())
    return None


def _like(value: tuple, new: Iterable[Any]) -> tuple:
    """A tuple with other elements; one with names keeps them."""
    new = tuple(new)
    if all(a is b for a, b in zip(value, new, strict=True)):
        return value
    return type(value)._make(new) if hasattr(value, "_make") else new
