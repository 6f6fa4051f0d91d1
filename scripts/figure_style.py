"""How every figure of the repository looks: sizes, and colours safe for colour-blind readers.

BP is black, fixed point orange and dashed, Highway-BP blue: darker with growing k, so that hue,
lightness and line style each tell methods apart.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.rows import Row

SERIES_COLOUR = {"bp": "black", "fixed_point": "#D55E00", "highway": "#0072B2"}
LINE_STYLE = {"bp": "-", "fixed_point": "--", "highway": "-"}
SERIES_MARKER = {"bp": "D", "fixed_point": "s", "highway": "o"}
_RAMP = {"fixed_point": "Oranges", "highway": "Blues"}


def colour(row: Row, largest_k: int) -> str | tuple[float, ...]:
    """A row's colour: the method's hue, darker the larger k."""
    if row["grad"] == "bp":
        return "black"
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


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the time of its making, so that the same rows give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
