"""Run a whole row of the paper: every method, k and seed of results/paper.yaml, in one sweep.

    python scripts/sweep.py resnet32                           # or: make sweep ROW=resnet32
    python scripts/sweep.py resnet32 --jobs 2 steps=390 device=cpu

What stands behind the row's name goes to train.py. Finished runs are skipped, interrupted ones go
on, whatever stopped them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from scripts.evidence.every_source import run
from scripts.evidence.paper import REPOSITORY, PaperRow, paper_row


def overrides(row: PaperRow, preset: str, root: Path, jobs: int) -> list[str]:
    """The sweep as arguments of train.py; a k that a method does not use makes no more runs.

    Raises:
        UserError: the row's methods have different k.
    """
    methods = [name for name in row.sweep if name != "seeds"]
    ks = row.sweep[methods[0]]
    if any(row.sweep[name] != ks for name in methods):
        raise UserError(
            f"results/paper.yaml: sweep of {row.key}: the k of {', '.join(methods)} "
            "differ; expected the same for all"
        )
    side_by_side = ["hydra/launcher=local", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    return [
        f"experiment={preset}",
        f"grad={','.join(['bp', *methods])}",
        f"k={_listed(ks)}",
        f"seed={_listed(row.sweep['seeds'])}",
        f"run_root={root}",
        *side_by_side,
    ]


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def preset_of(row: PaperRow, stand_in: str | None) -> str:
    """The row's preset, or a stand-in of it; UserError naming those there are for another."""
    if stand_in and stand_in not in row.stand_ins:
        raise UserError(
            f"stand-in {stand_in!r} of {row.key}; expected "
            f"{' or '.join(row.stand_ins) or 'none, the row has no stand-in'}"
        )
    return stand_in or row.preset


def whole_number(text: str) -> int:
    """The argument of --jobs."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--jobs {text}; expected a whole number, at least 1")
    return int(text)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", help="a key of results/paper.yaml, such as resnet32")
    parser.add_argument("overrides", nargs="*", help="arguments of train.py, such as steps=390")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="the row's runs go to a folder of its name in this one",
    )
    parser.add_argument("--jobs", default="1", help="runs at a time on this machine")
    parser.add_argument("--stand-in", help="a preset that stands in for the row's own")
    args = parser.parse_intermixed_args(argv)
    row = paper_row(args.row)
    asked = overrides(
        row, preset_of(row, args.stand_in), args.runs / row.key, whole_number(args.jobs)
    )
    command = ["-m", *asked, *args.overrides]
    print("python train.py", shlex.join(command), flush=True)
    train = str(REPOSITORY / "train.py")
    os.execv(sys.executable, [sys.executable, train, *command])  # signals go to the sweep itself


if __name__ == "__main__":
    run(main)
