"""Pictures of what schedules of k reach for how many passes through the blocks.

NAME.jsonl gives figures/NAME.schedules.png if it has runs with a schedule: final score, mean and
deviation over seeds, against passes per step that have to follow each other when every layer has a
device of its own (k for Highway-BP, L for backpropagation), and against the processor time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.rows import (
    METHOD_NAMES,
    Row,
    by_method,
    devices_of,
    has_k,
    mean_and_deviation,
    metric_of,
    title,
)
from scripts.figures.draw import BARS
from scripts.figures.figure_style import SMALL, footer, look, panels, save_with_rows

SCHEDULE_MARKERS = "s^Dv*P<>"
SCHEDULE_COLOUR = "#E69F00"


def passes_per_step(row: Row) -> float:
    return row["sequential_passes"] / row["steps"]


def processor_seconds(row: Row) -> float:
    return row["cpu_seconds"]


def draw_panel(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float], label: str) -> None:
    """A point per method: fixed k joined by a line, BP with a band of its deviation."""
    markers = cycle(SCHEDULE_MARKERS)
    fixed: dict[str, list[tuple[float, float]]] = {}
    for group in by_method(rows).values():
        first, x = group[0], fmean(map(cost, group))
        y, deviation = mean_and_deviation(group)
        style = look(first) | {"ls": "", "ms": 5}
        if first["schedule"]:
            style |= {"color": SCHEDULE_COLOUR, "marker": next(markers), "mec": "0.2", "mew": 0.5}
        axes.errorbar(x, y, deviation, **style, label=name_of(first))
        if first["grad"] == "bp" and deviation is not None:
            axes.axhspan(y - deviation, y + deviation, color="0.9", lw=0, zorder=0)
        if has_k(first):
            fixed.setdefault(style["color"], []).append((x, y))
            axes.annotate(
                f"k={first['k']}",
                (x, y),
                label_place(first),
                fontsize=SMALL,
                textcoords="offset points",
                zorder=1.5,
            )  # below markers
    for colour, points in fixed.items():
        axes.plot(*zip(*sorted(points), strict=True), color=colour, lw=1)
    axes.set_xlabel(label)
    axes.set_ylabel(f"final {metric_of(rows).label}")


def label_place(row: Row) -> tuple[int, int]:
    """Where k stands beside its point: off a line that rises with k, or falls."""
    if row["metric"] != "eval_accuracy":
        return 5, 4
    return (-19, 5) if row["k"] else (4, -9)


def name_of(row: Row) -> str:
    """In the legend: a schedule without what there is no room for, a method at any one k."""
    if row["schedule"]:
        short = row["schedule"].replace(" start=0", "").replace(" exact_from=0.9", "")
        return short.split(" signal")[0]
    return METHOD_NAMES[row["grad"]] + (", one k throughout" if has_k(row) else "")


def draw(rows: list[Row], name: str, folder: Path) -> Path | None:
    """The picture of a setup, None without schedules or a fixed k to hold them against."""
    rows = [row for row in rows if row["sequential_passes"] is not None]
    if not any(row["schedule"] for row in rows) or not any(map(has_k, rows)):
        return None
    figure, axes = panels(1, 2, 2.8, title(rows[0]))
    draw_panel(axes[0], rows, passes_per_step, "sequential passes through the blocks per step")
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].xaxis.set_major_formatter(ScalarFormatter())
    draw_panel(axes[1], rows, processor_seconds, "processor time of training (s)")
    footer(figure, axes, [f"times on {devices_of(rows)}; {BARS}"])
    return save_with_rows(figure, folder / f"{name}.schedules.png", {name: rows})


def jobs(results: Results) -> Jobs:
    return {
        f"{name}.schedules": partial(draw, rows, name, results.folder / "figures")
        for name, rows in results.setups.items()
    }
