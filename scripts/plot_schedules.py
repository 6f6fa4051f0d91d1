"""Draw what schedules of k reach for how many passes through the blocks.

    python scripts/plot_schedules.py results

NAME.jsonl gives figures/NAME.schedules.png if it has runs with a schedule: final score, mean and
deviation over seeds, against passes per step that have to follow each other when every layer has a
device of its own (k for Highway-BP, L for backpropagation), and against the process's processor
time; and beside it NAME.schedules.rows.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes

from scripts.every_source import for_every_source, run
from scripts.figure_style import SERIES_COLOUR, save, two_panels
from scripts.rows import (
    METHOD_NAMES,
    Row,
    by_method,
    devices_of,
    has_k,
    metric_of,
    rows_used,
    score,
    title,
)

SCHEDULE_MARKERS = "s^Dv*P<>"
SCHEDULE_COLOUR = "#D55E00"


def passes_per_step(row: Row) -> float:
    return row["sequential_passes"] / row["steps"]


def processor_seconds(row: Row) -> float:
    return row["cpu_seconds"]


def draw_panel(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float], label: str) -> None:
    """A point per method: fixed k joined by a line, BP with a band of its deviation."""
    markers = cycle(SCHEDULE_MARKERS)
    fixed: dict[str, list[tuple[float, float]]] = {}
    for name, group in by_method(rows).items():
        x, values = fmean(map(cost, group)), [score(row) for row in group]
        y, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        if group[0]["schedule"]:
            axes.errorbar(x, y, deviation, fmt=next(markers), color=SCHEDULE_COLOUR, capsize=2,
                          label=short(group[0]["schedule"]))  # fmt: skip
        elif group[0]["grad"] == "bp":
            axes.errorbar(x, y, deviation, fmt="X", color="black", capsize=2, label="BP")
            axes.axhspan(y - deviation, y + deviation, color="0.9", lw=0, zorder=0)
        else:
            grad = group[0]["grad"]
            fixed.setdefault(grad, []).append((x, y))
            axes.errorbar(x, y, deviation, fmt="o", color=SERIES_COLOUR[grad], capsize=2)
            axes.annotate(name.split()[-1], (x, y), (3, -11), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    for grad, points in fixed.items():
        axes.plot(*zip(*sorted(points), strict=True), color=SERIES_COLOUR[grad], lw=1,
                  label=f"{METHOD_NAMES[grad]}, one k throughout")  # fmt: skip
    axes.set_xlabel(label)
    axes.set_ylabel(f"final {metric_of(rows).label}")


def short(schedule: str) -> str:
    """Without what the legend has no room for."""
    return schedule.replace(" start=0", "").replace(" exact_from=0.9", "").split(" signal")[0]


def draw(rows: list[Row], name: str, results: Path) -> Path | None:
    """The picture of a setup, None without schedules or a fixed k to hold them against."""
    rows = [row for row in rows if row["sequential_passes"] is not None]
    if not any(row["schedule"] for row in rows) or not any(map(has_k, rows)):
        return None
    figure, left, right = two_panels(title(rows[0]), f"times on {devices_of(rows)}")
    draw_panel(left, rows, passes_per_step, "sequential passes through the blocks per step")
    left.set_xscale("symlog", linthresh=1)
    draw_panel(right, rows, processor_seconds, "processor time of training (s)")
    left.legend(frameon=False, fontsize=7)
    picture = results / "figures" / f"{name}.schedules.png"
    save(figure, picture)
    picture.with_suffix(".rows.txt").write_text(rows_used(rows, picture))
    return picture


def main(argv: Sequence[str]) -> None:
    for_every_source(__doc__.splitlines()[0], draw, argv)


if __name__ == "__main__":
    run(main)
