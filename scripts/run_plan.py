"""Make the runs of results/plan.yaml that are missing, in its order, some at a time.

    python scripts/run_plan.py --jobs 2                      # all of it
    python scripts/run_plan.py gru_pixels gru_chars --list   # of these experiments, say which

Every run is a process of train.py with one thread. Interrupted runs go on, finished ones are
skipped. SIGINT, SIGTERM and the end of --seconds let all of them write a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from experiments.provenance import REPOSITORY
from scripts.evidence.paper import PlannedRun, paper_rows, plan
from scripts.program import run

STOPPED = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # exit codes of a run that can go on


def command(one: PlannedRun, root: Path, more: Sequence[str]) -> list[str]:
    beside = [f"seed={one.seed}", f"run_root={root / one.key}", "logger=none"]
    train = str(REPOSITORY / "train.py")
    return [sys.executable, train, *one.overrides, *beside, "trainer.threads=1", *more]


def finished(root: Path) -> set[tuple]:
    """The runs below ``root`` that have ended in a row."""
    found = set()
    for done in root.glob("*/*/DONE"):
        row = json.loads((done.parent / "row.json").read_text())
        one = PlannedRun(done.parent.parent.name, tuple(row["overrides"]), row["seed"])
        found.add(one.result)
    return found


class Stop:
    """Whether to stop: a signal has come, or the time is up."""

    def __init__(self, seconds: float | None):
        self._until = None if seconds is None else time.monotonic() + seconds
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or (self._until is not None and time.monotonic() > self._until)


def work(todo: list[PlannedRun], root: Path, jobs: int, more: Sequence[str], stop: Stop) -> int:
    """Run them in their order, ``jobs`` at a time; returns how many failed."""
    failed = 0
    waiting, running, asked = deque(todo), {}, set()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "log.txt", "a") as log:
        while running or (waiting and not stop):
            while waiting and len(running) < jobs and not stop:
                one = waiting.popleft()
                print(f"{time.strftime('%H:%M:%S')} {one}", flush=True)
                running[one] = subprocess.Popen(
                    command(one, root, more), stdout=log, stderr=log, cwd=REPOSITORY
                )
            for one, process in list(running.items()):
                code = process.poll()
                if code is None and stop and one not in asked:
                    asked.add(one)
                    process.send_signal(signal.SIGTERM)
                if code is not None:
                    del running[one]
                    failed += code not in STOPPED
                    if code:
                        print(f"{one} ended with exit code {code}, see {log.name}", flush=True)
            time.sleep(1.0)
    return failed


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="experiments of results/paper.yaml; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--gpu", action="store_true", help="those that take hours on a GPU as well")
    parser.add_argument("--set", nargs="+", default=[], help="more arguments of train.py")
    parser.add_argument("--list", action="store_true", help="say what is missing, run nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.keys) - set(paper_rows()):
        known = ", ".join(paper_rows())
        raise UserError(f"{', '.join(sorted(unknown))}; expected some of {known}")
    keys, done = args.keys or list(paper_rows()), finished(args.runs)
    todo = [
        one
        for one in plan()
        if one.key in keys and one.result not in done and (args.gpu or not one.gpu)
    ]
    print(f"{len(todo)} runs to make", flush=True)
    if args.list:
        for one in todo:
            print(shlex.join(command(one, args.runs, args.set)))
        return
    if failed := work(todo, args.runs.absolute(), args.jobs, args.set, Stop(args.seconds)):
        raise UserError(f"{failed} runs failed")


if __name__ == "__main__":
    run(main)
