"""Compare the finished runs below a folder: final score, and training loss against time.

python scripts/plot_runs.py runs/demo --out runs/demo/demo.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
from matplotlib.axes import Axes

from experiments.errors import UserError
from scripts.evidence.rows import Arm, Row, by_arm, devices_of, finished_runs, metric_of, score
from scripts.figures.panels import Drawing, footer, log_axis, panels
from scripts.figures.style import look_of_k
from scripts.program import run

SPAN = 8  # records over which training losses are averaged: one batch's loss is too noisy


def table(arms: dict[Arm, list[Row]]) -> str:
    """One line per method: final score, training seconds, seconds relative to BP's."""
    metric = metric_of(next(iter(arms.values()))[0])
    found = pd.DataFrame(
        [
            (len(rows), fmean(map(score, rows)), fmean(row["seconds"] for row in rows))
            for rows in arms.values()
        ],
        index=map(str, arms),
        columns=["runs", metric.label, "seconds"],
    )
    found["x BP"] = found["seconds"] / found["seconds"].get("BP", float("nan"))
    digits = {metric.label: metric.digits, "seconds": 1, "x BP": 2}
    formatters = {name: f"{{:.{n}f}}".format for name, n in digits.items()}
    return found.to_string(formatters=formatters, na_rep="-")


def draw_scores(axes: Axes, arms: dict[Arm, list[Row]]) -> None:
    """Draw every run as a point, and write the mean over seeds above."""
    metric = metric_of(next(iter(arms.values()))[0])
    for x, (arm, rows) in enumerate(arms.items()):
        values = [score(row) for row in rows]
        axes.plot([x] * len(values), values, **look_of_k(arm) | {"ls": ""}, ms=6)
        text = f"{fmean(values):.{metric.digits}f}"
        axes.annotate(text, (x, max(values)), (0, 6), ha="center", textcoords="offset points")
    axes.margins(x=0.15, y=0.2)
    axes.set_xticks(range(len(arms)), [str(arm).replace(" k=", "\nk=") for arm in arms])
    axes.set_ylabel(f"final {metric.label}")


def draw_losses(axes: Axes, arms: dict[Arm, list[Row]], records: dict[int, list[dict]]) -> None:
    """Draw the training loss of every run against its seconds of training."""
    for arm, rows in arms.items():
        style = look_of_k(arm) | {"marker": ""}
        for number, row in enumerate(rows):
            trained = [r for r in records[id(row)] if "train_loss" in r]
            curve = pd.DataFrame(trained, columns=["seconds", "train_loss"], dtype=float)
            losses = curve["train_loss"].ewm(span=SPAN).mean()
            axes.plot(curve["seconds"], losses, **style, label=None if number else str(arm))
    log_axis(axes)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("training loss (nats)")


def title(rows: list[Row], root: Path) -> str:
    """Model, data and steps of all rows; UserError if they differ."""
    found = {f"{r['model']} on {r['data']}, {r['steps']} steps of {r['batch_size']}" for r in rows}
    if len(found) != 1:
        raise UserError(f"{root} mixes {' and '.join(sorted(found))}; expected only one of them")
    return found.pop()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds run folders")
    parser.add_argument("--out", type=Path, help="the picture (default: ROOT/comparison.png)")
    args = parser.parse_args(argv)
    runs = finished_runs(args.root)
    rows = [row for row, _ in runs]
    arms, records = by_arm(rows), {id(row): found for row, found in runs}
    figure, (left, right) = panels(1, 2, 2.8, title(rows, args.root))
    draw_scores(left, arms)
    draw_losses(right, arms, records)
    footer(figure, [right], [f"{devices_of(rows)}; losses: averages over {SPAN} records"])
    out = args.out or args.root / "comparison.png"
    print(table(arms))
    print(f"picture: {Drawing(figure).write(out.parent, out.stem)}")


if __name__ == "__main__":
    run(main)
