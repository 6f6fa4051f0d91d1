"""What the programs that turn results/*.jsonl into figures and tables have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.errors import UserError
from scripts.rows import Row, read_rows, setups

Write = Callable[[list[Row], str, Path], Path | None]


def for_every_source(description: str, write: Write, argv: Sequence[str]) -> None:
    """Call ``write(rows, name, results)`` for every setup in every NAME.jsonl; print its file."""
    results = results_folder(description, argv)
    for name, rows in every_setup(results):
        written = write(rows, name, results)
        if written is not None:
            print(written)


def results_folder(description: str, argv: Sequence[str]) -> Path:
    """The command line's one argument."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="folder with NAME.jsonl files")
    return parser.parse_args(argv).results


def every_setup(results: Path) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows) of every setup in every NAME.jsonl.

    The fullest setup of NAME.jsonl has the name NAME, the others are NAME.2, NAME.3, ... A file
    that cannot be read is told at once, the others go on.

    Raises:
        UserError: the folder has no such file, or, after all others, some could not be read.
    """
    failed = []
    for source in sources(results):
        try:
            groups = setups(read_rows(source))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(source.name)
            continue
        for number, rows in enumerate(groups, start=1):
            yield source.stem if number == 1 else f"{source.stem}.{number}", rows
    if failed:
        raise UserError(f"left out {', '.join(failed)}; all others are done")


def sources(results: Path) -> list[Path]:
    """All NAME.jsonl of a results folder; UserError if it has none."""
    found = sorted(results.glob("*.jsonl"))
    if not found:
        raise UserError(f"no *.jsonl in {results}; collect runs with scripts/collect_rows.py")
    return found


def run(main: Callable[[Sequence[str]], None]) -> None:
    """``main`` with the command line's arguments; a user's mistake is told in one line."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: cannot write {error.filename} ({error.strerror})")
