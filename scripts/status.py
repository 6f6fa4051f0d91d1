"""Show which planned runs are done, to collect, running, interrupted or missing, and what to do.

    python scripts/status.py            # or: make status
    python scripts/status.py -v         # every single run

Reads results/*.jsonl, results/plan.yaml and the run folders below runs.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd

from experiments.run_folder import is_busy
from scripts.evidence.paper import PlannedRun, paper_rows, plan
from scripts.program import run
from scripts.run_plan import recorded, run_folders

GPU = "missing, for a GPU"
STATES = ("done", "to collect", "running", "interrupted", "missing", GPU)


def states(runs: Path, device: str) -> dict[PlannedRun, str]:
    """The state of every planned run on a kind of device, from its row or else its run folder."""
    found = {}
    for folder, one, where in run_folders(runs):
        if where == device and (folder / "DONE").exists():
            found[one.result] = "to collect"
        elif where == device:
            found[one.result] = "running" if is_busy(folder) else "interrupted"
    found |= dict.fromkeys(recorded(device), "done")
    return {one: found.get(one.result, GPU if one.gpu else "missing") for one in plan()}


def table(found: dict[PlannedRun, str]) -> str:
    """A line per experiment, a column per state."""
    counts = pd.crosstab([one.key for one in found], list(found.values()))
    counts = counts.reindex(index=list(paper_rows()), columns=list(STATES), fill_value=0)
    counts.index.name = None
    return counts.astype(str).replace("0", "-").rename_axis(columns=None).to_string()


def next_command(found: dict[PlannedRun, str], runs: Path, device: str) -> str:
    known = set(found.values())
    if "to collect" in known:
        return f"python scripts/collect_rows.py {runs}"
    if known & {"interrupted", "missing"}:
        return f"python scripts/run_plan.py --runs {runs}"
    if GPU in known and device == "cuda":
        return f"python scripts/run_plan.py --runs {runs} --gpu"
    return "make status, later" if "running" in known else "make figures tables report"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the runs")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every run")
    args = parser.parse_args(argv)
    found = states(args.runs, args.device)
    if args.verbose:
        for one, state in found.items():
            print(f"{state:18}  {one}")
    print(f"on {args.device}; --device chooses")
    print(table(found))
    print(f"next: {next_command(found, args.runs, args.device)}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # status.py -v | head
    run(main)
