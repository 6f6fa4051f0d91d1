"""Add the finished runs below folders named after experiments to their results files.

    python scripts/collect_rows.py runs      # runs/KEY/... goes to results/KEY.jsonl

A run that has a row there already is skipped. Runs of uncommitted code are refused, because no
commit describes them, and so are runs that no preset of results/paper.yaml makes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from experiments.files import write_text
from experiments.row import key_of
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.rows import curve, finished_runs, name_of_run, read_rows
from scripts.evidence.settings import settings_of
from scripts.program import run


def collect(paper: PaperRow, folder: Path, results: Path) -> tuple[int, list[str]]:
    """Add the runs of one experiment's folder; return their number, and why others were refused."""
    file = results / f"{paper.key}.jsonl"
    rows, added, refused = read_rows(file), [], []
    known = {key_of(row) for row in rows}
    for row, records in finished_runs(folder):
        if key_of(row) in known:
            continue
        _, problems = settings_of(paper, [row])
        if row["dirty"]:
            problems = [f"{name_of_run(row)} has uncommitted changes; make it from a commit"]
        refused += problems
        added += [] if problems else [{**row, "curve": curve(row, records)}]
    if added:
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows + added))
        print(f"{file}: {len(added)} rows added, {len(rows) + len(added)} in all")
    return len(added), refused


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder with a folder KEY of runs per experiment")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    found = [
        collect(paper, args.runs / key, args.results)
        for key, paper in paper_rows().items()
        if any((args.runs / key).rglob("DONE"))
    ]
    if not found:
        raise UserError(
            f"{args.runs} has no finished runs; expected folders named {', '.join(paper_rows())}"
        )
    print(f"{sum(added for added, _ in found)} rows added")
    if refused := [line for _, lines in found for line in lines]:
        raise UserError(f"{len(refused)} refused: {'; '.join(refused)}")


if __name__ == "__main__":
    run(main)
