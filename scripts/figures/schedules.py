"""Schedules of k: final score against passes through the blocks, a panel per experiment.

Scores are means over seeds with their intervals. Passes are those per step that have to follow each
other when every layer has its own device: k for Highway-BP, L for backpropagation.
"""

from itertools import cycle
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from scripts.evidence.results import Results
from scripts.evidence.rows import METRICS, Arm, score
from scripts.evidence.settings import Setting, half_interval
from scripts.figures.panels import INTERVALS, Drawing, footer, one_each
from scripts.figures.style import SCHEDULE, SMALL, look

MARKERS = "s^Dv*P<>"


def draw(results: Results) -> Drawing | None:
    """The figure; None if no setting has both schedules and a fixed k to compare them with."""
    shown = [
        (paper, setting.only(arms_of(setting)))
        for paper, setting in results.chosen
        if setting
        and any(arm.schedule for arm in setting.arms)
        and any(arm.k is not None for arm in setting.plain())
    ]
    if not shown:
        return None
    title = "Schedules of k: score against sequential passes"
    figure, axes = one_each(title, shown, 3, draw_panel)
    footer(figure, axes, [INTERVALS])
    return Drawing(figure, [row for _, setting in shown for row in setting.rows])


def arms_of(setting: Setting) -> list[Arm]:
    """The arms with schedules, those with one k throughout, and backpropagation."""
    kept = (arm for arm in setting.arms if arm.schedule or arm.plain)
    return [arm for arm in kept if arm.grad != "fixed_point"]


def draw_panel(axes: Axes, setting: Setting) -> None:
    markers, fixed = cycle(MARKERS), []
    for arm, rows in setting.arms.items():
        values = [score(row) for row in rows]
        x = fmean(row["sequential_passes"] / row["steps"] for row in rows)
        style = look(arm) | {"ls": "", "ms": 5}
        if arm.schedule:
            style |= SCHEDULE | {"marker": next(markers)}
        axes.errorbar(x, fmean(values), half_interval(values), **style, label=name_of(arm))
        if arm.k is not None:
            fixed.append((x, fmean(values)))
            offset = {"textcoords": "offset points", "fontsize": SMALL, "zorder": 1.5}
            axes.annotate(f"k={arm.k}", fixed[-1], (5, 4), **offset)
    axes.plot(*zip(*sorted(fixed), strict=True), color=look(Arm("highway"))["color"], lw=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("sequential passes per step")
    axes.set_ylabel(f"final {METRICS[setting.paper.metric].label}")


def name_of(arm: Arm) -> str:
    """The name in the legend: schedules are shortened, and all fixed k share one name."""
    if arm.schedule:
        return arm.schedule.replace(" start=0", "").partition(" signal")[0]
    return "BP" if arm.grad == "bp" else "Highway, one k throughout"
