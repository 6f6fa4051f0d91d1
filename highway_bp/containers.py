"""Find and replace tensors in tuples, lists and dictionaries among the arguments of layers.
A key-value cache counts as one object."""

from __future__ import annotations

import copy
from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn

from highway_bp.caches import is_cache


def leaves(value: Any) -> list[Any]:
    """All values in ``value`` that are not containers themselves."""
    items = _items(value)
    return [value] if items is None else [leaf for _, inner in items for leaf in leaves(inner)]


def replaced(value: Any, others: dict[int, Any]) -> Any:
    """``value`` with what has its id in ``others`` replaced: tensors, or caches.

    Lists and dictionaries are changed in place and stay the same objects: a layer may write into
    them for others to read.
    """
    items = _items(value)
    if items is None:
        return others.get(id(value), value)
    if isinstance(value, tuple):
        return _like(value, [replaced(inner, others) for _, inner in items])
    for key, inner in items:
        if (new := replaced(inner, others)) is not inner:  # the container may be read-only
            value[key] = new
    return value


def copied(value: Any, others: dict[int, Any]) -> Any:
    """As `replaced`, in new containers."""
    items = _items(value)
    if items is None:
        return others.get(id(value), value)
    if isinstance(value, tuple):
        return _like(value, [copied(inner, others) for _, inner in items])
    try:
        new = copy.copy(value)
    except TypeError:  # read-only, so that no layer writes into it
        new = value
    for key, inner in items:
        if (own := copied(inner, others)) is not inner:
            new[key] = own
    return new


_LISTS = (tuple, list)
_PLAIN = frozenset([Tensor, nn.Parameter, type(None), bool, int, float, str])


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    if type(value) in _PLAIN:  # spares most arguments the slower checks
        return None
    if isinstance(value, _LISTS):
        return list(enumerate(value))
    if isinstance(value, MutableMapping) and not is_cache(value):
        return list(value.items())
    return None


def _like(value: tuple, new: Iterable[Any]) -> tuple:
    """The tuple with new elements, of the same type."""
    new = tuple(new)
    if all(a is b for a, b in zip(value, new, strict=True)):
        return value
    if hasattr(value, "_make"):
        return type(value)._make(new)
    if hasattr(value, "n_fields"):  # the results of an operation of torch, topk say
        return type(value)(new)
    return tuple.__new__(type(value), new)
