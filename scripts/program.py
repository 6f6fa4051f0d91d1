"""How a program starts, and how it reports a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from hydra.errors import HydraException

from experiments.errors import UserError, one_line


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run ``main`` with the command line's arguments; report a user's mistake in one line."""
    try:
        main(sys.argv[1:])
    except HydraException as error:  # a preset that is not there, a wrong argument of train.py
        sys.exit(f"error: {one_line(error)}")
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        sys.exit(f"error: {message(error)}")


def at_least_one(text: str) -> int:
    """The number of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, at least 1")
    return int(text)


def message(error: UserError | OSError) -> str:
    """One line about a mistake, or a file that cannot be read or written."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read or write {error.filename} ({error.strerror})"
    return str(error)
