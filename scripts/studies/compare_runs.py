"""Compare runs, step by step, with the first run.

    python scripts/studies/compare_runs.py one=runs/A two=runs/B --out results/equal.json

It prints and records the largest differences of the losses and gradient norms in metrics.jsonl.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd

from experiments.errors import UserError
from scripts.benchmark import save
from scripts.evidence.rows import Row, read_run
from scripts.program import run

COMPARED = ["train_loss", "grad_norm", "eval_loss"]


def by_step(records: list[dict]) -> pd.DataFrame:
    """What a run has recorded, by step."""
    return pd.DataFrame(records).groupby("step").first()


def differences(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, dict]:
    """By score, the number of records and the largest difference with its step.

    Raises:
        UserError: the runs have not recorded the same, or no record has a score.
    """
    if not a.notna().equals(b.notna()):
        raise UserError("the runs have not recorded the same steps and scores")
    if missing := set(COMPARED) - set(a):
        raise UserError(
            f"no record has {', '.join(missing)}; expected runs with a smaller trainer.log_interval"
        )
    apart = (a[COMPARED] - b[COMPARED]).abs()
    found = apart.agg(["count", "max", "idxmax"]).T
    found.columns = ["records", "largest", "at_step"]
    return found.astype({"records": int, "at_step": int}).to_dict("index")


def named(argument: str) -> tuple[str, tuple[Row, list[dict]]]:
    """Label, and row and records of a run."""
    label, _, path = argument.partition("=")
    if not path:
        raise UserError(f"{argument}; expected LABEL=FOLDER")
    row, records = read_run(Path(path))
    if row["diverged"]:
        raise UserError(f"{path} has diverged; expected a run that has not")
    return label, (row, records)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    args = parser.parse_args(argv)
    runs = dict(named(argument) for argument in args.runs)
    if len(runs) < 2:
        raise UserError(f"label {', '.join(runs)} alone; expected runs with at least two labels")
    (first, (_, records)), *others = runs.items()
    found = []
    for label, (_, other) in others:
        apart = differences(by_step(records), by_step(other))
        shown = [f"{name} {apart[name]['largest']:.2g}" for name in COMPARED]
        print(f"{label}: largest difference from {first}: {'; '.join(shown)}")
        found.append({"run": label, "of": first, **apart})
    save({"runs": {n: row for n, (row, _) in runs.items()}, "differences": found}, args.out)


if __name__ == "__main__":
    run(main)
