"""What the programs that turn results/*.jsonl into figures and tables have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.errors import UserError


def for_every_source(
    description: str, write: Callable[[Path, Path], Path | None], argv: Sequence[str]
) -> None:
    """Call ``write(source, results)`` for every NAME.jsonl; print the files it names.

    Raises:
        UserError: the folder has none.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="folder with NAME.jsonl files")
    results = parser.parse_args(argv).results
    sources = sorted(results.glob("*.jsonl"))
    if not sources:
        raise UserError(f"no *.jsonl in {results}; collect runs with scripts/collect_rows.py")
    for source in sources:
        written = write(source, results)
        if written is not None:
            print(written)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """``main`` with the command line's arguments; a user's mistake is told in one line."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
