"""What schedules of k reach for how many passes through the blocks, a panel per experiment.

Final score, mean and interval over seeds, against passes per step that have to follow each other
when every layer has a device of its own: k for Highway-BP, L for backpropagation.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.rows import METRICS, Arm, score
from scripts.evidence.settings import Setting
from scripts.figures.draw import INTERVALS, interval, open_panel
from scripts.figures.style import SCHEDULE, SMALL, footer, look, panels, save_with_rows

MARKERS = "s^Dv*P<>"


def arms_of(setting: Setting) -> list[Arm]:
    """Schedules, one k throughout, and backpropagation."""
    return [
        arm for arm in setting.arms if (arm.schedule or arm.plain) and arm.grad != "fixed_point"
    ]


def draw_panel(axes: Axes, setting: Setting) -> None:
    markers, fixed = cycle(MARKERS), []
    for arm in arms_of(setting):
        rows = setting.arms[arm]
        values = [score(row) for row in rows]
        x = fmean(row["sequential_passes"] / row["steps"] for row in rows)
        style = look(arm) | {"ls": "", "ms": 5}
        if arm.schedule:
            style |= SCHEDULE | {"marker": next(markers)}
        axes.errorbar(x, fmean(values), interval(values), **style, label=name_of(arm))
        if arm.k is not None:
            fixed.append((x, fmean(values)))
            axes.annotate(
                f"k={arm.k}",
                fixed[-1],
                (5, 4),
                fontsize=SMALL,
                textcoords="offset points",
                zorder=1.5,
            )
    axes.plot(*zip(*sorted(fixed), strict=True), color=look(Arm("highway"))["color"], lw=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("sequential passes through the blocks per step")
    axes.set_ylabel(f"final {METRICS[setting.paper.metric].label}")


def name_of(arm: Arm) -> str:
    """In the legend: a schedule without what there is no room for, a method at any one k."""
    if arm.schedule:
        return arm.schedule.replace(" start=0", "").partition(" signal")[0]
    return "BP" if arm.grad == "bp" else "Highway, one k throughout"


def draw(results: Results) -> Path | None:
    """None where no setting has both schedules and a fixed k to hold them against."""
    shown = [
        (paper, setting)
        for paper, setting in results.chosen
        if setting
        and any(arm.schedule for arm in setting.arms)
        and any(arm.plain and arm.k is not None for arm in setting.arms)
    ]
    if not shown:
        return None
    figure, axes = panels(1, len(shown), 3.0, "Schedules of k: score against sequential passes")
    for part, (paper, setting) in zip(axes, shown, strict=True):
        if open_panel(part, paper, setting):
            draw_panel(part, setting)
    footer(figure, axes, [INTERVALS])
    used = [row for _, setting in shown for arm in arms_of(setting) for row in setting.arms[arm]]
    return save_with_rows(figure, results.folder / "figures" / "schedules.png", used)


def jobs(results: Results) -> Jobs:
    return {"schedules": partial(draw, results)}
