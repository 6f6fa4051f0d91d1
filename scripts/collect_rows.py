"""Add the finished runs below folders named after experiments to their results files.

    python scripts/collect_rows.py runs      # runs/KEY/... goes to results/KEY.jsonl

A run that is there already is left out. Refused are runs of uncommitted code, which no commit
describes, and runs that no preset of results/paper.yaml makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.atomic import write_text
from experiments.errors import UserError
from experiments.row import key_of
from scripts.evidence.paper import paper_rows
from scripts.evidence.results_io import rows_file, run
from scripts.evidence.rows import Row, curve, finished_runs, name_of_run
from scripts.evidence.settings import settings_of


def collect(folder: Path, results: Path) -> tuple[int, list[str]]:
    """Add the runs of one experiment's folder; how many, and what was refused and why."""
    paper = paper_rows()[folder.name]
    file, rows = rows_file(results, paper.key)
    known, refused, added = {key_of(row) for row in rows}, [], []
    for row, records in finished_runs(folder):
        if key_of(row) in known:
            continue
        problem = reason(row, settings_of(paper, [row])[1])
        if problem:
            refused.append(problem)
        else:
            added.append({**row, "curve": curve(row, records)})
    if added:
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows + added))
        print(f"{file}: {len(added)} rows added, {len(rows) + len(added)} in all")
    return len(added), refused


def reason(row: Row, strangers: list[str]) -> str | None:
    """Why a row cannot be taken."""
    if row["dirty"]:
        return f"{name_of_run(row)} was made with uncommitted changes; make it from a commit"
    return strangers[0] if strangers else None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder with a folder KEY of runs per experiment")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    folders = [args.runs / key for key in paper_rows() if any((args.runs / key).rglob("DONE"))]
    if not folders:
        raise UserError(
            f"{args.runs} has no finished runs; expected folders named {', '.join(paper_rows())}"
        )
    found = [collect(folder, args.results) for folder in folders]
    print(f"{sum(added for added, _ in found)} rows added")
    if refused := [line for _, lines in found for line in lines]:
        raise UserError(f"{len(refused)} refused: {'; '.join(refused)}")


if __name__ == "__main__":
    run(main)
