"""How a program starts, and how it reports a user's mistake."""

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
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: cannot read or write {error.filename} ({error.strerror})")


def at_least_one(text: str) -> int:
    """The number of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, at least 1")
    return int(text)
