"""What the programs that turn results/ into figures, tables and the page have in common.

They list their files as jobs; each is made for itself, so one that fails does not keep the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.rows import Row, read_rows
from scripts.evidence.settings import Setting, settings_of

Job = Callable[[], Path | None]  # makes one file; None where there is nothing to make it from
Jobs = dict[str, Job]  # by the file's name without suffix


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        settings: by experiment, the settings that its rows are of, the paper's own first.
        left_out: what could not be read, or is of no preset, in words.
    """

    folder: Path
    settings: dict[str, list[Setting]]
    left_out: list[str] = field(default_factory=list)

    def best(self, key: str) -> Setting | None:
        """The setting that stands for an experiment in figures and tables."""
        return next(iter(self.settings[key]), None)

    @property
    def chosen(self) -> list[tuple[PaperRow, Setting | None]]:
        """That of every experiment, in the order of Table 2."""
        return [(paper, self.best(key)) for key, paper in paper_rows().items()]

    def records(self, pattern: str) -> dict[str, Any]:
        """Records of benchmarks by file name; one that cannot be read is left out."""
        found = {}
        for file in sorted(self.folder.glob(pattern)):
            try:
                found[file.stem] = json.loads(file.read_text())
            except ValueError as error:
                self.left_out.append(f"{file.name} is not JSON ({error}); measure again")
        return found


def read_results(folder: Path) -> Results:
    """All KEY.jsonl of the paper's experiments; what cannot be read is told and left out.

    Raises:
        UserError: the folder has no such file.
    """
    found: dict[str, list[Setting]] = {}
    left_out = []
    for key, paper in paper_rows().items():
        file, rows = folder / f"{key}.jsonl", []
        try:
            rows = read_rows(file) if file.exists() else []
        except UserError as error:
            left_out.append(str(error))
        found[key], strangers = settings_of(paper, rows)
        left_out += [f"{file.name}: {stranger}" for stranger in strangers]
    if not any((folder / f"{key}.jsonl").exists() for key in found):
        raise UserError(f"no KEY.jsonl in {folder}; collect runs with scripts/collect_rows.py")
    for line in left_out:
        print(f"error: {line}", file=sys.stderr)
    return Results(folder, found, left_out)


def make_all(
    description: str, outputs: str, jobs: Callable[[Results], Jobs], argv: Sequence[str]
) -> None:
    """Make all files of a program that takes a results folder, and print their paths.

    Args:
        outputs: the folder below the results folder that they are written to.

    Raises:
        UserError: at the end, after all that could be made, if something could not.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="folder with KEY.jsonl files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these files alone")
    args = parser.parse_args(argv)
    results = read_results(args.results)
    found = jobs(results)
    if unknown := set(args.only or ()) - set(found):
        raise UserError(f"--only {' '.join(sorted(unknown))}; expected some of {', '.join(found)}")
    (args.results / outputs).mkdir(exist_ok=True)
    failed = []
    for name in args.only or found:
        try:
            written = found[name]()
        except (UserError, OSError) as error:
            print(f"error: {name}: {_in_words(error)}", file=sys.stderr)
            failed.append(name)
        else:
            if written is not None:
                print(written)
    if failed or results.left_out:
        raise UserError(f"left out {', '.join(failed) or 'some rows'}; all others are done")


def rows_file(results: Path, key: str) -> tuple[Path, list[Row]]:
    """The file of an experiment's rows, and what is in it."""
    file = results / f"{key}.jsonl"
    return file, read_rows(file) if file.exists() else []


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot write {error.filename} ({error.strerror})"
    return str(error)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """``main`` with the command line's arguments; a user's mistake is told in one line."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {_in_words(error)}")
