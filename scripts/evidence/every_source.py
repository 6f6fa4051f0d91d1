"""What the programs that turn results/ into figures and tables have in common.

They list their files as jobs; each is made for itself, so one that fails does not keep the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments.errors import UserError
from scripts.evidence.rows import Row, read_rows, setups

Job = Callable[[], Path | None]  # makes one file; None where there is nothing to make it from
Jobs = dict[str, Job]  # by the file's name without suffix


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        setups: rows by setup. The fullest setup of NAME.jsonl is NAME, the others are NAME.2, ...
        left_out: files that could not be read.
    """

    folder: Path
    setups: dict[str, list[Row]]
    left_out: list[str]

    def of(self, key: str) -> dict[str, list[Row]]:
        """The setups of KEY.jsonl, the fullest first."""
        return {name: rows for name, rows in self.setups.items() if key_of(name) == key}


def key_of(setup: str) -> str:
    """KEY of KEY and of KEY.2."""
    return setup.partition(".")[0]


def read_results(folder: Path) -> Results:
    """Every setup in every NAME.jsonl; a file that cannot be read is told and left out.

    Raises:
        UserError: the folder has no such file.
    """
    found, left_out = {}, []
    for source in sources(folder):
        try:
            groups = setups(read_rows(source))
        except UserError as error:
            tell(error)
            left_out.append(source.name)
            continue
        for number, rows in enumerate(groups, start=1):
            found[source.stem if number == 1 else f"{source.stem}.{number}"] = rows
    return Results(folder, found, left_out)


def sources(results: Path) -> list[Path]:
    """All NAME.jsonl of a results folder; UserError if it has none."""
    found = sorted(results.glob("*.jsonl"))
    if not found:
        raise UserError(f"no *.jsonl in {results}; collect runs with scripts/collect_rows.py")
    return found


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
    parser.add_argument("results", type=Path, help="folder with NAME.jsonl files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these files alone")
    args = parser.parse_args(argv)
    results = read_results(args.results)
    (args.results / outputs).mkdir(exist_ok=True)
    failed = list(results.left_out)
    for name, job in _chosen(jobs(results), args.only):
        try:
            written = job()
        except (UserError, OSError) as error:
            tell(error)
            failed.append(name)
        else:
            if written is not None:
                print(written)
    if failed:
        raise UserError(f"left out {', '.join(failed)}; all others are done")


def jobs_of(programs: Iterable[ModuleType]) -> Callable[[Results], Jobs]:
    """The jobs of several modules that have a function ``jobs`` each."""
    return lambda results: {
        name: job for program in programs for name, job in program.jobs(results).items()
    }


def _chosen(jobs: Jobs, only: Sequence[str] | None) -> Iterator[tuple[str, Job]]:
    unknown = set(only or ()) - set(jobs)
    if unknown:
        raise UserError(
            f"--only {' '.join(sorted(unknown))}; expected names among {', '.join(jobs)}"
        )
    return (item for item in jobs.items() if not only or item[0] in only)


def tell(error: Exception) -> None:
    print(f"error: {_in_words(error)}", file=sys.stderr)


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
