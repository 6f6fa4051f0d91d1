"""Compare runs step by step with the first of them.

    python scripts/compare_runs.py one=runs/A "two processes=runs/B" --out results/equal_gpt2.json

prints and records the largest differences of what their metrics.jsonl have in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from scripts.evidence.results_io import run
from scripts.evidence.rows import read_json_lines

COMPARED = ("train_loss", "grad_norm", "eval_loss")
ABOUT = (
    "model",
    "grad",
    "k",
    "group_size",
    "processes",
    "replicas",
    "micro_batches",
    "data",
    "steps",
    "batch_size",
    "seed",
    "commit",
    "dirty",
    "device",
    "torch",
    "config_hash",
)


def difference(a: Sequence[dict], b: Sequence[dict], name: str) -> dict[str, float]:
    """How many records of both have ``name``, and where they differ most."""
    pairs = [(x["step"], abs(x[name] - y[name])) for x, y in zip(a, b, strict=True) if name in x]
    step, most = max(pairs, key=lambda pair: pair[1])
    return {"records": len(pairs), "largest": most, "at_step": step}


def compared(a: tuple[str, Path], b: tuple[str, Path]) -> dict[str, Any]:
    """Differences of run ``b`` from run ``a``.

    Raises:
        UserError: they have not recorded the same steps.
    """
    records = [read_json_lines(path / "metrics.jsonl") for _, path in (a, b)]
    steps = [[(r["step"], sorted(r)) for r in found] for found in records]
    if steps[0] != steps[1]:
        raise UserError(
            f"{a[1]} and {b[1]} have not recorded the same steps and scores; expected "
            "finished runs of equal length and intervals"
        )
    return {"run": b[0], "of": a[0], **{name: difference(*records, name) for name in COMPARED}}


def about(path: Path) -> dict[str, Any]:
    try:
        row = json.loads((path / "row.json").read_text())
    except OSError as error:
        raise UserError(f"{path} is no finished run ({error}); expected a run folder") from error
    return {name: row[name] for name in ABOUT if name in row}


def named(argument: str) -> tuple[str, Path]:
    label, _, path = argument.partition("=")
    if not path:
        raise UserError(f"{argument}; expected LABEL=FOLDER")
    return label, Path(path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    args = parser.parse_args(argv)
    runs = [named(argument) for argument in args.runs]
    record = {
        "runs": {label: about(path) for label, path in runs},
        "differences": [compared(runs[0], other) for other in runs[1:]],
    }
    for found in record["differences"]:
        shown = "; ".join(
            f"{name} {found[name]['largest']:.2g} (of {found[name]['records']})"
            for name in COMPARED
        )
        print(f"{found['run']}: largest difference from {found['of']}: {shown}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
