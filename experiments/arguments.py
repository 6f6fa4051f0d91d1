"""Checks of the command line, for mistakes that Hydra answers by a traceback or by its usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString

from experiments.errors import UserError
from experiments.usage import GROUPS


def options_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with options such as ``-m`` before the overrides, as Hydra wants them.

    Raises:
        UserError: an option is unknown, or a group's choice is not a name.
        OverrideParseException: an argument is neither an option nor KEY=VALUE.
    """
    parser = get_args_parser()
    parser.error = _refuse
    overrides = parser.parse_intermixed_args(arguments).overrides
    check_choices(overrides)
    options = [argument for argument in arguments if argument != "--"]
    for override in overrides:
        options.remove(override)
    return options + overrides


def check_choices(overrides: Sequence[str]) -> None:
    """Raise UserError unless each choice of a group is a name, list of names, dict or glob."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name, value = override.key_or_group, override.value()
        if name not in GROUPS or override.is_delete():
            continue
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            names = choice if isinstance(choice, list) else [choice]
            if not all(isinstance(one, str | QuotedString | dict | Glob) for one in names):
                expected = f"{name}=NAME, a file of configs/{name}"
                raise UserError(f"{override.input_line}; expected {expected}")


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; python train.py --help shows what may be given")
