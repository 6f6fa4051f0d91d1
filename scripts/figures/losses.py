"""Losses during training: the paper's Figures 3 and 5, and loss against time for every experiment.

A time is steps times the time of a step, which bench_steps.py measures for all methods side by side
on a quiet machine. The runs' own times are not used, because runs shared their machine.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from scripts.evidence.paper import PaperRow
from scripts.evidence.results import Results
from scripts.evidence.rows import Arm, Row
from scripts.evidence.settings import Setting
from scripts.figures.panels import (
    Drawing,
    footer,
    gap,
    log_axis,
    one_each,
    open_panel,
    panels,
)
from scripts.figures.style import look_of_k

SEEDS = "losses: means over seeds at equal steps"
NOT_TIMED = "times not measured:\n\npython scripts/bench_steps.py\n"
TIME = "time: steps times the time of a step, all methods measured side by side on a quiet machine"


def draw_pair(key: str, title: str, x: str, results: Results) -> Drawing:
    """Loss against ``x`` ("steps", or "time" if it was measured), and loss less BP's at a step."""
    paper, setting = next(chosen for chosen in results.chosen if chosen[0].key == key)
    setting = setting and with_curves(setting)
    notes = untimed(results, paper, setting) if x == "time" else []
    if x == "time" and setting and not results.step_seconds(setting):
        x, notes = "steps", [" ".join(NOT_TIMED.split()) + " " + setting.preset]
    figure, (left, right) = panels(1, 2, 2.9, f"{title} against {x}")
    if open_panel(left, paper, setting, notes):
        against_steps(left, setting) if x == "steps" else against_time(results, left, setting)
        against_bp(right, setting)
    else:
        right.set_visible(False)
    footer(figure, [left, right], [f"{SEEDS}; right: less BP's of the same seeds, line at 0: BP"])
    return Drawing(figure, setting.rows if setting else [])


def draw_time(results: Results) -> Drawing:
    """A panel per experiment that has learned, without the fixed point."""
    shown = [(paper, with_curves(s)) for paper, s in results.chosen if s and s.learned]
    draw = partial(against_time, results)
    figure, axes = one_each(
        "Evaluation loss against time", shown, 3, draw, partial(untimed, results)
    )
    footer(figure, axes, [f"{TIME}; {SEEDS}"])
    drawn = [s.only(results.step_seconds(s)) for _, s in shown]
    return Drawing(figure, [row for setting in drawn for row in setting.rows])


def with_curves(setting: Setting) -> Setting:
    """The setting's runs of backpropagation and of Highway-BP at every k; without any, all runs."""
    return setting.only(setting.plain("bp", "highway") or setting.arms)


def untimed(results: Results, _: PaperRow, setting: Setting | None) -> list[str]:
    """A note that names the methods whose step was not measured, if others were."""
    seconds = results.step_seconds(setting) if setting else {}
    lacking = [str(arm) for arm in setting.arms if arm not in seconds] if seconds else []
    return [f"step not measured: {', '.join(lacking)}"] if lacking else []


def mean_curve(rows: Sequence[Row]) -> pd.Series:
    """The mean evaluation loss over seeds, by step."""
    found = [pd.DataFrame(row["curve"]["eval"]).set_index("step")["eval_loss"] for row in rows]
    return pd.concat(found, axis=1).astype(float).mean(axis=1, skipna=False).dropna()


def draw_lines(axes: Axes, lines: dict[Arm, pd.Series], x: str, y: str) -> None:
    for arm, line in lines.items():
        style = look_of_k(arm) | {"ms": 3, "markevery": 0.13}
        axes.plot(line.index, line, **style, label=str(arm))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def against_steps(axes: Axes, setting: Setting) -> None:
    lines = {arm: mean_curve(rows) for arm, rows in setting.arms.items()}
    draw_lines(axes, lines, "training steps", "evaluation loss (nats)")
    log_axis(axes)


def against_time(results: Results, axes: Axes, setting: Setting) -> None:
    seconds = results.step_seconds(setting)
    if not seconds:
        gap(axes, NOT_TIMED + setting.preset)
        return
    known = {arm: mean_curve(rows) for arm, rows in setting.arms.items() if arm in seconds}
    lines = {arm: line.set_axis(line.index * seconds[arm]) for arm, line in known.items()}
    draw_lines(axes, lines, "training time (s)", "evaluation loss (nats)")
    log_axis(axes)


def against_bp(axes: Axes, setting: Setting) -> None:
    """Draw the loss less backpropagation's, at the same step and of the same seeds."""
    exact, lines = {row["seed"]: row for row in setting.arm("bp")}, {}
    for arm in setting.plain("highway"):
        rows = [row for row in setting.arms[arm] if row["seed"] in exact]
        if rows:
            line = mean_curve(rows) - mean_curve([exact[row["seed"]] for row in rows])
            lines[arm] = line.dropna()
    draw_lines(axes, lines, "training steps", "loss less BP's (nats)")
    axes.axhline(0.0, color="black", lw=1)
