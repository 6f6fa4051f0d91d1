"""Losses during training: the paper's Figures 3 and 5, and loss against time for every experiment.

A time is steps times the time of a step, which bench_steps.py measures for all methods side by side
on a quiet machine. The runs' own times are not used, because runs shared their machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from scripts.evidence.results import Results
from scripts.evidence.rows import Arm, Row
from scripts.evidence.settings import Setting
from scripts.figures.panels import Drawing, footer, gap, log_axis, one_each, open_panel, panels
from scripts.figures.style import look_of_k

SEEDS = "losses: means over seeds at equal steps"
TIME = "time: steps times the time of a step, all methods measured side by side on a quiet machine"


def draw_pair(key: str, title: str, x: str, results: Results) -> Drawing:
    """Loss against ``x`` ("steps" or "time"), and loss less backpropagation's at equal steps."""
    paper, setting = next(chosen for chosen in results.chosen if chosen[0].key == key)
    figure, (left, right) = panels(1, 2, 2.9, title)
    if open_panel(left, paper, setting):
        against_steps(left, setting) if x == "steps" else against_time(results, left, setting)
        against_bp(right, setting)
    else:
        right.set_visible(False)
    footer(figure, [left, right], [SEEDS])
    return Drawing(figure, setting.rows if setting else [])


def draw_time(results: Results) -> Drawing:
    """A panel per experiment that has learned, without the fixed point."""
    shown = [(paper, setting) for paper, setting in results.chosen if setting and setting.learned]
    draw = partial(against_time, results)
    figure, axes = one_each("Evaluation loss against time", shown, 3, draw)
    footer(figure, axes, [f"{TIME}; {SEEDS}"])
    return Drawing(figure, [row for _, setting in shown for row in setting.rows])


def curves(setting: Setting) -> dict[Arm, pd.Series]:
    """The evaluation loss of backpropagation and of Highway-BP at every k, by step."""
    return {arm: mean_curve(setting.arms[arm]) for arm in setting.plain("bp", "highway")}


def mean_curve(rows: Sequence[Row]) -> pd.Series:
    """The mean evaluation loss over seeds, by step."""
    found = [pd.DataFrame(row["curve"]["eval"]).set_index("step")["eval_loss"] for row in rows]
    return pd.concat(found, axis=1).astype(float).mean(axis=1, skipna=False).dropna()


def draw_lines(axes: Axes, setting: Setting, lines: dict[Arm, pd.Series], x: str, y: str) -> None:
    for arm, line in lines.items():
        style = look_of_k(arm) | {"ms": 3, "markevery": 0.13}
        axes.plot(line.index, line, **style, label=setting.label(arm))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def against_steps(axes: Axes, setting: Setting) -> None:
    draw_lines(axes, setting, curves(setting), "training steps", "evaluation loss (nats)")
    log_axis(axes)


def against_time(results: Results, axes: Axes, setting: Setting) -> None:
    seconds = results.step_seconds(setting)
    if not seconds:
        gap(axes, f"times not measured\n\npython scripts/bench_steps.py\n{setting.preset}")
        return
    known = {arm: line for arm, line in curves(setting).items() if arm in seconds}
    lines = {arm: line.set_axis(line.index * seconds[arm]) for arm, line in known.items()}
    draw_lines(axes, setting, lines, "training time (s)", "evaluation loss (nats)")
    log_axis(axes)


def against_bp(axes: Axes, setting: Setting) -> None:
    """Draw the loss less backpropagation's loss at the same step."""
    lines = curves(setting)
    exact = lines.pop(next(arm for arm in lines if arm.grad == "bp"))
    lines = {arm: (line - exact).dropna() for arm, line in lines.items()}
    draw_lines(axes, setting, lines, "training steps", "loss less BP's (nats)")
    axes.axhline(0.0, color="black", lw=1)
