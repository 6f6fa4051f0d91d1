"""Checks of plain arguments."""

from __future__ import annotations


def check_whole(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}; expected a whole number, at least {least}")
    if value < least:
        raise ValueError(f"{name}={value}; expected a whole number, at least {least}")
