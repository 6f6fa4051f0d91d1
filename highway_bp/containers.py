"""Tensors in tuples, lists and dictionaries among the arguments of layers.

A key-value cache, an object that every layer writes into, is no such container.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn


def leaves(value: Any) -> list[Any]:
    """All values in ``value`` that are not containers themselves."""
    items = _items(value)
    return [value] if items is None else [leaf for _, inner in items for leaf in leaves(inner)]


def wants_gradient(value: Any, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a tensor in ``value``, or a parameter, requires a gradient."""
    given = (t for t in leaves(value) if isinstance(t, Tensor))
    return any(t.requires_grad for t in itertools.chain(given, parameters))


def replaced(value: Any, others: dict[int, Any], copies: bool = False) -> Any:
    """``value`` with each tensor or cache replaced whose id is in ``others``.

    Args:
        copies: whether all lists and dictionaries are copied. Otherwise they are changed in place
            and stay the same objects: a layer may write into them for others to read.
    """
    items = _items(value)
    if items is None:
        return others.get(id(value), value)
    if isinstance(value, tuple):
        return _like(value, [replaced(inner, others, copies) for _, inner in items])
    if copies:
        with contextlib.suppress(TypeError):  # read-only: no layer writes into it
            value = copy.copy(value)
    for key, inner in items:
        if (new := replaced(inner, others, copies)) is not inner:  # it may be read-only
            value[key] = new
    return value


_PLAIN = frozenset([Tensor, nn.Parameter, type(None), bool, int, float, str])


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    if type(value) in _PLAIN:  # spares most arguments the slower checks
        return None
    if isinstance(value, tuple | list):
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
