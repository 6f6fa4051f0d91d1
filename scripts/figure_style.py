"""How every figure of the repository looks: sizes, and colours safe for colour-blind readers.

BP is black, truncated BPTT green and dash-dotted, fixed point orange and dashed, Highway-BP blue;
the last two are darker with growing k, so that hue, lightness and line style tell methods apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from scripts.rows import Row, has_k, method_name

SERIES_COLOUR = {
    "bp": "black", "truncated_bptt": "#009E73", "fixed_point": "#D55E00", "highway": "#0072B2",
}  # fmt: skip
LINE_STYLE = {"bp": "-", "truncated_bptt": "-.", "fixed_point": "--", "highway": "-"}
SERIES_MARKER = {"bp": "D", "truncated_bptt": "^", "fixed_point": "s", "highway": "o"}
SMOOTHING_SPAN = 8
_RAMP = {"fixed_point": "Oranges", "highway": "Blues"}


def colour(row: Row, largest_k: int) -> str | tuple[float, ...]:
    """A row's colour: the method's hue, darker the larger k."""
    if not has_k(row):
        return SERIES_COLOUR[row["grad"]]
    lightness = 0.4 + 0.6 * row["k"] / max(largest_k, 1)
    return matplotlib.colormaps[_RAMP[row["grad"]]](lightness)


def two_panels(title: str, note: str) -> tuple[Figure, Axes, Axes]:
    """A figure with a left and a right panel, a title, and a small note below."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(note, fontsize=7, color="0.35")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure, left, right


def draw_loss(axes: Axes, curves: Iterable[tuple[Row, dict[str, list[float]]]]) -> None:
    """Training loss against training seconds, a line per run: (row, training curve) each.

    A batch's loss is too noisy to compare runs by: the lines are exponential averages, the span of
    which the axis names.
    """
    curves = list(curves)
    largest_k = max(row["k"] or 0 for row, _ in curves)
    named = set()
    for row, train in curves:
        name = method_name(row)
        smooth = pd.Series(train["train_loss"]).ewm(span=SMOOTHING_SPAN).mean()
        axes.plot(train["seconds"], smooth, LINE_STYLE[row["grad"]], lw=1.4,
                  color=colour(row, largest_k), label=None if name in named else name)
        named.add(name)
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.set_xlabel("training time (s)")
    axes.set_ylabel(f"training loss (averaged over {SMOOTHING_SPAN} records)")
    axes.legend(frameon=False, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the time of its making, so that the same rows give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
