"""Make the missing runs of results/plan.yaml, --jobs of them at a time.

    python scripts/run_plan.py --jobs 2                      # all missing runs
    python scripts/run_plan.py gru_pixels gru_chars --list   # list those of these experiments

Runs are made in the order of the experiments given, or in the plan's order. Every run is a process
of train.py with one thread. Interrupted runs are resumed. Runs that are finished, or have a row in
results/ from this kind of device, are skipped. On SIGINT or SIGTERM the runs in progress write a
checkpoint and end.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from experiments.errors import UserError
from experiments.interrupt import StopSignal
from experiments.provenance import REPOSITORY
from experiments.run_folder import STARTED
from scripts.evidence.paper import RESULTS, PlannedRun, paper_rows, plan
from scripts.evidence.rows import read_rows
from scripts.program import at_least_one, run

# exit codes: finished, or can be resumed
STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)


def run_folders(root: Path) -> Iterator[tuple[Path, PlannedRun, str]]:
    """Yield run folders below ``root``/KEY, the run started in each, and the kind of device."""
    for file in root.glob(f"*/*/{STARTED}"):
        try:
            about = json.loads(file.read_text())
            one = PlannedRun(file.parts[-3], tuple(about["overrides"]), about["seed"])
            found = file.parent, one, about["device_kind"]
        except (ValueError, KeyError, TypeError):
            print(f"not counted: {file.parent}, {STARTED} is damaged", file=sys.stderr)
            continue
        yield found


def recorded(device: str) -> set[tuple]:
    """`PlannedRun.result` of all committed rows from a kind of device."""
    return {
        PlannedRun(key, tuple(row["overrides"]), row["seed"]).result
        for key in paper_rows()
        for row in read_rows(RESULTS / f"{key}.jsonl")
        if row["device_kind"] == device
    }


def command(one: PlannedRun, root: Path, more: Sequence[str]) -> list[str]:
    beside = [f"seed={one.seed}", f"run_root={root / one.key}", "logger=none"]
    train = str(REPOSITORY / "train.py")
    return [sys.executable, train, *one.overrides, *beside, "trainer.threads=1", *more]


def make(one: PlannedRun, root: Path, more: Sequence[str], stop: StopSignal) -> bool:
    """Make one run, or end it by SIGTERM once ``stop`` has arrived; return whether it failed."""
    if stop.received:
        return False
    print(f"{time.strftime('%H:%M:%S')} {one}", flush=True)
    with open(root / "log.txt", "a") as log:
        process = subprocess.Popen(command(one, root, more), stdout=log, stderr=log, cwd=REPOSITORY)
        while process.poll() is None and not stop.received:
            time.sleep(1.0)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    if code := process.wait():
        print(f"{one} ended with exit code {code}, see {log.name}", flush=True)
    return code not in STOPPED


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="experiments of results/paper.yaml; none: all")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument(
        "--gpu", action="store_true", help="make the runs that take hours on a GPU as well"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="make only runs in the paper's own settings, those for a GPU as well",
    )
    parser.add_argument("--set", nargs="+", default=[], help="more arguments of train.py")
    parser.add_argument("--list", action="store_true", help="print what is missing, run nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.keys) - set(paper_rows()):
        known = ", ".join(paper_rows())
        raise UserError(f"{', '.join(sorted(unknown))}; expected some of {known}")
    done = {one.result for folder, one, _ in run_folders(args.runs) if (folder / "DONE").exists()}
    done |= recorded("cuda" if torch.cuda.is_available() else "cpu")
    wanted = [one for key in args.keys for one in plan() if one.key == key] or plan()
    todo = [
        one
        for one in wanted
        if one.result not in done and (one.full if args.full else args.gpu or not one.gpu)
    ]
    print(f"{len(todo)} runs to make", flush=True)
    if args.list:
        for one in todo:
            print(shlex.join(command(one, args.runs, args.set)))
        return
    root = args.runs.absolute()
    root.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop, ThreadPoolExecutor(args.jobs) as pool:
        failed = sum(pool.map(lambda one: make(one, root, args.set, stop), todo))
    if failed:
        raise UserError(f"{failed} runs failed")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # run_plan.py --list | head
    run(main)
