"""What of the planned runs is done, to collect, running, interrupted or missing; what to type next.

    python scripts/status.py            # or: make status
    python scripts/status.py -v         # every single run

Reads results/*.jsonl, results/plan.yaml and the run folders below runs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.run_folder import STARTED, is_busy
from scripts.evidence.paper import PlannedRun, paper_rows, plan
from scripts.evidence.rows import read_rows
from scripts.program import run

STATES = ("done", "to collect", "running", "interrupted", "missing")


def folders(root: Path, device: str) -> Iterator[tuple[tuple, str]]:
    """The result and the state of every run folder below ``root``/KEY."""
    for file in root.glob(f"*/*/{STARTED}"):
        try:
            about = json.loads(file.read_text())
            one = PlannedRun(file.parts[-3], tuple(about["overrides"]), about["seed"])
            here = about["device_kind"] == device
        except (ValueError, KeyError, TypeError):
            print(f"not counted: {file.parent}, which does not say what it is", file=sys.stderr)
            continue
        if here and (file.parent / "DONE").exists():
            yield one.result, "to collect"
        elif here:
            yield one.result, "running" if is_busy(file.parent) else "interrupted"


def states(results: Path, runs: Path, device: str) -> dict[PlannedRun, str]:
    """The state of every planned run on a kind of device: of its row, else of its folder."""
    found = dict(folders(runs, device))
    for key in paper_rows():
        for row in read_rows(results / f"{key}.jsonl"):
            if row["device_kind"] == device:
                one = PlannedRun(key, tuple(row["overrides"]), row["seed"])
                found[one.result] = "done"
    return {one: found.get(one.result, "missing") for one in plan()}


def table(found: dict[PlannedRun, str]) -> str:
    """A line per experiment; runs for a GPU are counted apart."""
    lines = [("", *STATES, "missing, for a GPU")]
    for key in paper_rows():
        counts = Counter(
            "gpu" if one.gpu and state == "missing" else state
            for one, state in found.items()
            if one.key == key
        )
        lines.append((key, *(str(counts[state] or "-") for state in (*STATES, "gpu"))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def next_command(found: dict[PlannedRun, str], runs: Path) -> str:
    counts = Counter(state for one, state in found.items() if not one.gpu)
    if counts["to collect"]:
        return f"python scripts/collect_rows.py {runs}"
    if counts["interrupted"] or counts["missing"]:
        return "python scripts/run_plan.py"
    return "make status, later" if counts["running"] else "make figures tables report"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="runs made on it")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every run")
    args = parser.parse_args(argv)
    found = states(args.results, args.runs, args.device)
    if args.verbose:
        for one, state in found.items():
            print(f"{state:11}  {one}{' (GPU)' if one.gpu else ''}")
    print(table(found))
    print(f"next: {next_command(found, args.runs)}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # status.py -v | head
    run(main)
