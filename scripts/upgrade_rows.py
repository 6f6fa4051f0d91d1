"""Bring the rows of a results file of schema 1 to the present schema.

    python scripts/upgrade_rows.py results/gru_chars.jsonl --runs runs

What those rows did not record becomes null. Which rows may be compared (the field "setup") is
taken from the configurations in the folders of their runs, where ``--runs`` still has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.atomic import write_text
from experiments.config import setup_hash
from experiments.row import FIELDS, SCHEMA, check_row
from scripts.evidence.every_source import run
from scripts.evidence.rows import Row, read_json_lines


def configurations(root: Path) -> dict[str, dict]:
    """config.json of every run folder below ``root``, by the configuration's hash."""
    # <model>-<grad>[-k<k>]-<hash>-s<seed>
    found = {}
    for file in root.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("seed", None)
        found[file.parent.name.rsplit("-", 2)[1]] = config
    return found


def upgraded(row: Row, configs: dict[str, dict]) -> Row:
    """``row`` in the present schema; one that is there already stays as it is."""
    if row.get("schema", 1) != 1:
        return row
    config = configs.get(row["config_hash"])
    known = {
        "metric": "eval_accuracy",  # the oldest rows are of classifiers
        **row,
        "schema": SCHEMA,
        "setup": setup_hash(config) if config else None,
    }
    return {**{name: known.get(name) for name in FIELDS}, **known}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON-lines files, rewritten")
    parser.add_argument("--runs", type=Path, help="folder that holds the rows' run folders")
    args = parser.parse_args(argv)
    configs = configurations(args.runs) if args.runs else {}
    for file in args.results:
        rows = [upgraded(row, configs) for row in read_json_lines(file)]
        for number, row in enumerate(rows, start=1):
            check_row(row, f"{file} line {number}")
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        known = sum(row["setup"] is not None for row in rows)
        print(f"{file}: {len(rows)} rows, {known} with their setup")


if __name__ == "__main__":
    run(main)
