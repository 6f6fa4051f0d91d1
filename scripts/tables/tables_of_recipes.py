"""What a healthy run looks like on the way: tables/recipes.md, from the rows that are there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from scripts.evidence.clock import axis_of
from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.rows import Row, devices_of, has_k, method_name, metric_of, score
from scripts.evidence.shown import Shown, origin, shown_rows
from scripts.evidence.table import Table, markdown
from scripts.figures.draw import SMOOTHING_SPAN

NOTE = """One seed each. The training loss, an exponential average over records, after a tenth, a
quarter and half of the run; the first score that was taken, and after which step; the last; hours
per epoch of the data at this pace, on the processor's clock where other work slowed runs."""


def table(chosen: list[Shown]) -> Table:
    rows = [line(shown, row) for shown in chosen for row in one_of_each(shown.main())]
    return Table(
        (
            "experiment",
            "run here",
            "method",
            "loss, 10 %",
            "25 %",
            "50 %",
            "first score",
            "last score",
            "hours per epoch",
            "device",
        ),
        rows,
    )


def one_of_each(rows: list[Row]) -> list[Row]:
    """Backpropagation and the largest k of Highway-BP, their first seeds."""
    exact = [row for row in rows if row["grad"] == "bp"][:1]
    ours = [row for row in rows if row["grad"] == "highway" and has_k(row)]
    return exact + sorted(ours, key=lambda row: (-row["k"], row["seed"]))[:1]


def line(shown: Shown, row: Row) -> list[str]:
    train = row["curve"]["train"]
    loss = pd.Series(train["train_loss"]).ewm(span=SMOOTHING_SPAN).mean()
    moments = [
        f"{loss[_record(train['step'], part * row['steps'])]:.3f}" for part in (0.1, 0.25, 0.5)
    ]
    seconds = row["cpu_seconds"] if axis_of(shown.rows) == "processor" else row["seconds"]
    return [
        shown.paper.title,
        "; ".join(origin(shown.paper, row)),
        method_name(row),
        *moments,
        first_score(row),
        f"{score(row):.{metric_of([row]).digits}f} {metric_of([row]).label}",
        f"{seconds / row['epochs'] / 3600:.2f}",
        devices_of([row]),
    ]


def _record(steps: list[int], step: float) -> int:
    """The last record up to a step, or the first there is."""
    return max((i for i, s in enumerate(steps) if s <= step), default=0)


def first_score(row: Row) -> str:
    """Of an evaluation before the last, if there was one."""
    curve, metric = row["curve"]["eval"], metric_of([row])
    if len(curve["step"]) < 2:
        return "-"
    value = metric.factor * curve[row["metric"]][0]
    return f"{value:.{metric.digits}f} after {curve['step'][0]}"


def page(results: Results) -> str:
    chosen = [shown for shown in shown_rows(results).values() if shown.rows]
    return f"# On the way\n\n{NOTE}\n\n{markdown(table(chosen))}\n"


def write(results: Results) -> Path:
    path = results.folder / "tables" / "recipes.md"
    path.write_text(page(results))
    return path


def jobs(results: Results) -> Jobs:
    return {"recipes": partial(write, results)}
