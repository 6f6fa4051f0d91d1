"""Append the rows of finished runs to a results file, with their thinned curves.

    python scripts/collect_rows.py runs/resnet32 results/resnet32_preact.jsonl

A run that is in the file already (same config_hash and seed) is left out and named. Runs made
from a dirty working tree are refused, as no commit describes them. One file may hold several
setups, a reduced one beside the paper's: figures and tables keep them apart.
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
from scripts.evidence.every_source import run
from scripts.evidence.rows import Row, curve, finished_runs, method_name, read_rows, run_of


def check_clean(rows: list[Row]) -> None:
    dirty = [row for row in rows if row["dirty"]]
    if dirty:
        names = ", ".join(f"{method_name(r)} ({r['config_hash']}, seed {r['seed']})" for r in dirty)
        raise UserError(
            f"made with uncommitted changes: {names}; run them from a commit or use --allow-dirty"
        )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds run folders")
    parser.add_argument("results", type=Path, help="JSON-lines file, created when missing")
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="accept runs of a working tree with uncommitted changes",
    )
    args = parser.parse_args(argv)
    rows = read_rows(args.results) if args.results.exists() else []
    known = {run_of(row) for row in rows}
    added = []
    for row, records in finished_runs(args.root):
        if run_of(row) in known:
            print(f"already there: {method_name(row)} ({row['config_hash']}, seed {row['seed']})")
            continue
        known.add(run_of(row))
        added.append({**row, "curve": curve(row, records)})
    if not args.allow_dirty:
        check_clean(added)
    write_text(args.results, "".join(json.dumps(row) + "\n" for row in rows + added))
    print(f"{len(added)} rows added to {args.results}, {len(known)} in all")


if __name__ == "__main__":
    run(main)
