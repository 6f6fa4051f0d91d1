"""What of the paper's runs is done, being trained, interrupted or missing; and what to type next.

    python scripts/status.py            # or: make status
    python scripts/status.py -v         # every single run

Reads results/*.jsonl and the run folders below runs; loads neither torch nor configurations.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from experiments.run_folder import STARTED, is_busy
from scripts.evidence.every_source import run, tell
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.rows import method_name, read_rows, run_of

# States of a planned run; of several runs of it the first of these counts.
DONE, TO_COLLECT, RUNNING, INTERRUPTED, MISSING = STATES = (
    "done",
    "to collect",
    "running",
    "interrupted",
    "missing",
)
# Runs beside the plan: shorter, of another preset, or by a method the paper's table does not have.
REDUCED, STAND_IN, OTHER = BESIDE = ("reduced", "stand-in", "other")
NEEDED = {
    "experiment",
    "grad",
    "k",
    "schedule",
    "tolerance",
    "gamma",
    "group_size",
    "window",
    "steps",
    "seed",
    "config_hash",
    "reduced",
}
TAIL = 4096  # bytes: the last lines of a metrics file

Planned = tuple[str, int | None, int]  # grad, k, seed


@dataclass(frozen=True)
class Run:
    """A run that exists, as a row in results or as a folder.

    Attributes:
        about: what its row says, or its started.json.
        folder: None for a row in results.
    """

    about: dict[str, Any]
    state: str
    folder: Path | None = None

    def planned(self) -> Planned | None:
        """Which run of a plan this is, its preset and length aside; None for a method beyond it."""
        a = self.about
        beyond = a["schedule"] or a["tolerance"] or a["window"] or (a["group_size"] or 1) > 1
        return None if beyond else (a["grad"], a["k"], a["seed"])


@dataclass(frozen=True)
class RowStatus:
    """One row of the paper: the state and run of every planned one, and the runs beside."""

    row: PaperRow
    plan: dict[Planned, Run | None]
    beside: list[tuple[str, Run]]

    def count(self) -> Counter[str]:
        states = Counter(MISSING if found is None else found.state for found in self.plan.values())
        return states + Counter(kind for kind, _ in self.beside)

    def runs(self) -> list[Run]:
        return [*filter(None, self.plan.values()), *(one for _, one in self.beside)]

    def in_state(self, state: str) -> list[Run]:
        return [found for found in self.plan.values() if found and found.state == state]


def plan_of(row: PaperRow) -> list[Planned]:
    """Every run a complete reproduction of the row has; backpropagation has no k."""
    methods = [("bp", None)] + [
        (grad, k) for grad, ks in row.sweep.items() if grad != "seeds" for k in ks
    ]
    return [(grad, k, seed) for grad, k in methods for seed in row.sweep["seeds"]]


def status_of(row: PaperRow, runs: Sequence[Run]) -> RowStatus:
    """Sort a row's runs into its plan and beside it."""
    plan: dict[Planned, Run | None] = dict.fromkeys(plan_of(row))
    beside = []
    for one in sorted(runs, key=lambda r: STATES.index(r.state)):
        kind = _beside(one, row, plan)
        if kind:
            beside.append((kind, one))
        else:
            plan[one.planned()] = plan[one.planned()] or one
    return RowStatus(row, plan, beside)


def _beside(one: Run, row: PaperRow, plan: dict[Planned, Run | None]) -> str | None:
    if one.about["experiment"] in row.stand_ins:
        return STAND_IN
    if one.about["reduced"]:
        return REDUCED
    in_plan = one.about["experiment"] == row.preset and one.planned() in plan
    return None if in_plan else OTHER


def run_folders(root: Path) -> Iterator[Path]:
    """Every run folder below ``root``; they hold no others."""
    for folder, inner, files in os.walk(root):
        if "config.json" in files:
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def folder_run(folder: Path) -> Run | None:
    """The run in a folder; None where nothing says what it is (before started.json there was)."""
    done = (folder / "DONE").exists()
    about = _read(folder / STARTED) or (_read(folder / "row.json") if done else {})
    if not about.keys() >= NEEDED:
        return None
    return Run(about, TO_COLLECT if done else RUNNING if is_busy(folder) else INTERRUPTED, folder)


def _read(file: Path) -> dict[str, Any]:
    """Empty if it is not there or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def collect(results: Path, runs: Path) -> tuple[list[RowStatus], list[str], int]:
    """The status of every row; results files that cannot be read; folders that say nothing."""
    rows = paper_rows()
    found, broken = {}, []
    for key in rows:
        file = results / f"{key}.jsonl"
        try:
            found[key] = [Run(row, DONE) for row in read_rows(file)] if file.exists() else []
        except UserError as error:
            tell(error)
            broken.append(file.name)
            found[key] = []
    collected = {key: {run_of(one.about) for one in ones} for key, ones in found.items()}
    of_preset = {
        preset: key for key, row in rows.items() for preset in (row.preset, *row.stand_ins)
    }
    in_folders = [folder_run(folder) for folder in run_folders(runs)]
    for one in filter(None, in_folders):
        key = of_preset.get(one.about["experiment"])
        if key and run_of(one.about) not in collected[key]:
            found[key].append(one)
    statuses = [status_of(row, found[key]) for key, row in rows.items()]
    return statuses, broken, in_folders.count(None)


def table(statuses: Sequence[RowStatus]) -> str:
    """A line per row of the paper, and their sums."""
    lines = [("", "planned", *STATES, *(f"({kind})" for kind in BESIDE))]
    total: Counter[str] = Counter()
    for status in statuses:
        counts = status.count() + Counter(planned=len(status.plan))
        total += counts
        lines.append((status.row.key, *_numbers(counts)))
    lines.append(("all", *_numbers(total)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _numbers(counts: Counter[str]) -> list[str]:
    return [str(counts[name] or "-") for name in ("planned", *STATES, *BESIDE)]


def every_run(status: RowStatus) -> Iterator[str]:
    """A line per run of a row: planned ones, then those beside the plan."""
    yield f"{status.row.key}: {status.row.title}"
    for (grad, k, seed), one in status.plan.items():
        name = f"{grad} seed {seed}" if k is None else f"{grad} k={k} seed {seed}"
        yield f"  {name}: {_state(one) if one else MISSING}"
    for kind, one in status.beside:
        yield f"  {kind}: {method_name(one.about)} seed {one.about['seed']}: {_state(one)}"


def _state(one: Run) -> str:
    if one.folder is None:
        return one.state
    if one.state == TO_COLLECT:
        return f"{one.state}, {one.folder}"
    since = f" since {one.about['started']} on {one.about['host']}" * (one.state == RUNNING)
    return f"{one.state}{since}, step {_step(one.folder)} of {one.about['steps']}, {one.folder}"


def _step(folder: Path) -> int:
    """The last one in the metrics file, without reading all of it."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            whole = file.read().rpartition(b"\n")[0]
        return json.loads(whole.rpartition(b"\n")[2])["step"]
    except (OSError, ValueError):  # not yet there, or a line longer than the tail
        return 0


def next_command(statuses: Sequence[RowStatus], results: Path, runs: Path) -> str:
    """What to type now: collect what is finished, then train."""
    for status in statuses:
        clean = [one for one in status.in_state(TO_COLLECT) if not _dirty(one.folder)]
        if clean:
            folder = _to_collect(clean[0], status, statuses)
            return shlex.join(
                [
                    "python",
                    "scripts/collect_rows.py",
                    str(folder),
                    str(results / f"{status.row.key}.jsonl"),
                ]
            )
    return _next_sweep(statuses, runs)


def _next_sweep(statuses: Sequence[RowStatus], runs: Path) -> str:
    """What is interrupted comes before what is missing; a row that is being trained is left to
    whoever does."""
    where = "" if runs == Path("runs") else f" RUNS={shlex.quote(str(runs))}"
    idle = [status for status in statuses if not status.in_state(RUNNING)]
    for state in (INTERRUPTED, MISSING):
        for status in idle:
            if status.count()[state]:
                return f"make sweep ROW={status.row.key}{where}"
    if len(idle) < len(statuses):
        return "make status, later: what lacks is being trained"
    return "make figures tables"


def _dirty(folder: Path) -> bool:
    """Made with uncommitted changes: refused in results."""
    return _read(folder / "row.json").get("dirty", True)


def _to_collect(one: Run, status: RowStatus, statuses: Sequence[RowStatus]) -> Path:
    """The folder around a run's if all runs in it are of its row, else the run's own."""
    around = one.folder.parent
    strangers = [
        r
        for other in statuses
        if other is not status
        for r in other.runs()
        if r.folder and around in r.folder.parents
    ]
    return one.folder if strangers else around


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder with a NAME.jsonl per row"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every run")
    args = parser.parse_args(argv)
    statuses, broken, unknown = collect(args.results, args.runs)
    if args.verbose:
        for status in statuses:
            print("\n".join(every_run(status)), end="\n\n")
    print(table(statuses))
    if unknown:
        print(
            f"not counted: {unknown} folders in {args.runs} that do not say what they are "
            "(damaged, or of a version without started.json)"
        )
    print(f"next: {next_command(statuses, args.results, args.runs)}")
    if broken:
        raise UserError(f"left out {', '.join(broken)}; all others are counted")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # status.py -v | head
    run(main)
