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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from omegaconf import OmegaConf

from experiments.errors import UserError
from scripts.evidence.every_source import run
from scripts.evidence.paper import REPOSITORY

PLAN = REPOSITORY / "results" / "plan.yaml"
STOPPED = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # exit codes of a run that can go on


@dataclass(frozen=True)
class PlannedRun:
    """One run: the experiment whose rows it belongs to, train.py's arguments, the seed."""

    key: str
    overrides: tuple[str, ...]
    seed: int

    def command(self, root: Path, more: Sequence[str]) -> list[str]:
        beside = [f"seed={self.seed}", f"run_root={root / self.key}", "logger=none"]
        train = str(REPOSITORY / "train.py")
        return [sys.executable, train, *self.overrides, *beside, "trainer.threads=1", *more]

    def __str__(self) -> str:
        return f"{self.key}: {' '.join(self.overrides)} seed={self.seed}"


def planned(plan: Path = PLAN) -> list[PlannedRun]:
    """All runs of a plan, seed by seed."""
    return [
        PlannedRun(entry["key"], (f"experiment={entry['preset']}", *arm.split()), seed)
        for entry in OmegaConf.to_container(OmegaConf.load(plan))
        for seed in entry["seeds"]
        for arm in entry["arms"]
    ]


def finished(root: Path) -> set[PlannedRun]:
    """The runs below ``root`` that have ended in a row."""
    found = set()
    for done in root.glob("*/*/DONE"):
        row = json.loads((done.parent / "row.json").read_text())
        found.add(PlannedRun(done.parent.parent.name, tuple(row["overrides"]), row["seed"]))
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
    waiting, running = deque(todo), {}
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "log.txt", "a") as log:
        while running or (waiting and not stop):
            while waiting and len(running) < jobs and not stop:
                one = waiting.popleft()
                print(f"{time.strftime('%H:%M:%S')} {one}", flush=True)
                command = one.command(root, more)
                running[one] = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
            for one, process in list(running.items()):
                code = process.poll()
                if code is None and stop:
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
    parser.add_argument("--set", nargs="+", default=[], help="more arguments of train.py")
    parser.add_argument("--list", action="store_true", help="say what is missing, run nothing")
    args = parser.parse_args(argv)
    known = {one.key for one in planned()}
    if unknown := set(args.keys) - known:
        raise UserError(f"{', '.join(unknown)}; expected experiments of the plan: {sorted(known)}")
    done = finished(args.runs)
    todo = [one for one in planned() if one not in done and (not args.keys or one.key in args.keys)]
    print(f"{len(todo)} runs are missing of {len(planned())}", flush=True)
    if args.list:
        for one in todo:
            print(shlex.join(one.command(args.runs, args.set)))
        return
    if failed := work(todo, args.runs.absolute(), args.jobs, args.set, Stop(args.seconds)):
        raise UserError(f"{failed} runs failed")


if __name__ == "__main__":
    run(main)
