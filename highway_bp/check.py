"""Checks of plain arguments."""

from collections.abc import Iterable
from numbers import Integral, Real


def check_whole(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}; expected a whole number, at least {least}")
    if value < least:
        raise ValueError(f"{name}={value}; expected a whole number, at least {least}")


def check_share(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number between 0 and 1, both excluded."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}; expected a number between 0 and 1")
    if not 0 < value < 1:
        raise ValueError(f"{name}={value}; expected a number between 0 and 1")


def whole_numbers(name: str, values: object, least: int) -> list[int]:
    """``values`` as a list; TypeError or ValueError unless all are ints of at least ``least``."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}; expected a list of whole numbers")
    values = list(values)
    for value in values:
        check_whole(name, value, least)
    return values
