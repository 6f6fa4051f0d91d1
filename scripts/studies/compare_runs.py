"""Compare runs, step by step, with the first run.

    python scripts/studies/compare_runs.py one=runs/A two=runs/B --out results/equal.json

It prints and records the largest differences of the losses and gradient norms in metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.errors import UserError
from scripts.benchmark import save
from scripts.evidence.rows import read_json_lines
from scripts.program import run

COMPARED = ("train_loss", "grad_norm", "eval_loss")


def difference(a: Sequence[dict], b: Sequence[dict], name: str) -> dict[str, float]:
    """The number of records that have ``name``, and the largest difference with its step.

    Raises:
        UserError: no record has it.
    """
    pairs = [(x["step"], abs(x[name] - y[name])) for x, y in zip(a, b, strict=True) if name in x]
    if not pairs:
        raise UserError(f"no record has {name}; expected runs with a smaller trainer.log_interval")
    step, most = max(pairs, key=lambda pair: pair[1])
    return {"records": len(pairs), "largest": most, "at_step": step}


def compared(a: tuple[str, Path], b: tuple[str, Path]) -> dict[str, Any]:
    """Differences of run ``b`` from run ``a``; UserError if they recorded different steps."""
    records = [read_json_lines(path / "metrics.jsonl") for _, path in (a, b)]
    steps = [[(r["step"], sorted(r)) for r in found] for found in records]
    if steps[0] != steps[1]:
        raise UserError(
            f"{a[1]} and {b[1]} have not recorded the same steps and scores; expected "
            "finished runs of equal length and intervals"
        )
    return {"run": b[0], "of": a[0], **{name: difference(*records, name) for name in COMPARED}}


def named(argument: str) -> tuple[str, Path]:
    label, _, path = argument.partition("=")
    if not path:
        raise UserError(f"{argument}; expected LABEL=FOLDER")
    row = Path(path, "row.json")
    if not row.exists() or json.loads(row.read_text())["diverged"]:
        raise UserError(f"{path} is no finished run; expected one that has not diverged")
    return label, Path(path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    args = parser.parse_args(argv)
    runs = [named(argument) for argument in args.runs]
    found = [compared(runs[0], other) for other in runs[1:]]
    for one in found:
        shown = [f"{name} {one[name]['largest']:.2g}" for name in COMPARED]
        print(f"{one['run']}: largest difference from {one['of']}: {'; '.join(shown)}")
    rows = {label: json.loads((path / "row.json").read_text()) for label, path in runs}
    save({"runs": rows, "differences": found}, args.out)


if __name__ == "__main__":
    run(main)
