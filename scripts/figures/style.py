"""How every figure of the repository looks, and how it is saved.

Sizes are those of the printed page: no text below 7 points at its width. Colours are Okabe and
Ito's, safe for colour-blind readers: BP black, truncated BPTT green, fixed point vermilion and
dashed, Highway-BP blue. Where a line is one k, it is darker the larger k and has that k's marker,
so that hue, lightness, line style and marker tell lines apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.evidence.rows import Arm, Row, rows_used

WIDTH = 7.0  # inches: a printed page without its margins
TICK_LABELS = 0.5  # inches they take of a panel
GREY = "0.35"
PUBLISHED = "0.5"
SMALL = 7.0  # points
LINE = 1.25 * SMALL  # height of a line of small text
BOLD = 9.0  # points of plain text that are as wide as a panel's title
plt.rcParams.update(
    {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "figure.titlesize": 9,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "0.9",
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "errorbar.capsize": 2.5,
        "legend.frameon": False,
        "savefig.dpi": 220,
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.hashsalt": "highway_bp",
    }
)
# of nothing that changes with the day: the same rows give the same bytes
METADATA = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}

METHOD_LOOK = {
    "bp": {"color": "black", "marker": "X", "ls": "-"},
    "truncated_bptt": {"color": "#009E73", "marker": "^", "ls": "-."},
    "fixed_point": {"color": "#D55E00", "marker": "s", "ls": "--"},
    "highway": {"color": "#0072B2", "marker": "o", "ls": "-"},
    "mgrit": {"color": "0.45", "marker": "d", "ls": (0, (5, 1, 1, 1))},
}
SCHEDULE = {"color": "#E69F00", "mec": "0.2", "mew": 0.5}
_RAMP = {"fixed_point": "Oranges", "highway": "Blues"}
_KS = (0, 1, 2, 3, 4, 5, 10, 20)
_K_MARKERS = "os^DPv<*"


def look(arm: Arm) -> dict:
    """Colour, marker and line style of a series over k: one gradient method, one gamma."""
    style = dict(METHOD_LOOK[arm.grad])
    if arm.gamma == "auto":
        style |= {"color": "#CC79A7", "marker": "v", "ls": "-."}
    elif arm.gamma:
        style |= {"color": "#56B4E9" if arm.gamma < 0.5 else "#E69F00", "marker": "P", "ls": ":"}
    if not arm.plain:
        style["marker"] = "*"
    return style


def look_of_k(arm: Arm) -> dict:
    """Colour, marker and line style of one method at one k; of schedules, the method's."""
    style = look(arm)
    if arm.k is None:
        return style | {"lw": 1.5, "zorder": 3}
    place = np.interp(arm.k, _KS, np.linspace(0.4, 1.0, len(_KS)))
    marker = _K_MARKERS[_KS.index(arm.k)] if arm.k in _KS else "."
    ramp = matplotlib.colormaps[_RAMP.get(arm.grad, "Greys")]
    return style | {"color": ramp(place), "marker": marker}


def panels(rows: int, columns: int, height: float, title: str) -> tuple[Figure, np.ndarray]:
    """A figure of the printed page's width with a title, and its axes, row by row.

    ``height``, in inches, is that of title and panels; `footer` adds its own.
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    figure.suptitle("\n".join(wrapped(title, WIDTH, 9)))
    return figure, axes.ravel()


def wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines of text in a font size that fit in a width in inches."""
    return textwrap.wrap(text, int(72 * width / (0.52 * size)), break_on_hyphens=False)


def caption(axes: Axes, title: str, lines: Sequence[str]) -> None:
    """A panel's title, and small lines below it, wrapped to the panel's width."""
    width = WIDTH / axes.get_subplotspec().get_gridspec().ncols - TICK_LABELS
    parts = [part for line in lines for part in wrapped(line, width, SMALL)]
    axes.set_title(
        "\n".join(wrapped(title, width, BOLD)), loc="left", weight="bold", pad=4 + LINE * len(parts)
    )
    small = axes.annotate(
        "\n".join(parts),
        (0, 1),
        (0, 3),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        fontsize=SMALL,
        color=GREY,
        linespacing=1.15,
    )
    small.set_in_layout(False)  # the title's pad makes room for it


def gap(axes: Axes, text: str) -> None:
    """A panel without data, which says so and what would make it."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="0.8", linestyle=(0, (4, 4)))
    axes.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        transform=axes.transAxes,
        color=GREY,
        fontsize=SMALL,
        linespacing=1.6,
    )


def footer(figure: Figure, axes: Sequence[Axes], notes: Sequence[str] = ()) -> None:
    """One legend of all labels in ``axes``, and notes, below the panels: they cover no data."""
    found = {}
    for part in axes:
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    widest = max((len(label) for label in found), default=0)
    columns = min(len(found), int(WIDTH * 72 / (0.56 * SMALL * widest + 40))) or 1
    legend_lines = -(-len(found) // columns)
    text = "\n".join(part for note in notes for part in wrapped(note, WIDTH, SMALL))
    note_height = LINE * (text.count("\n") + 1 if text else 0) + 4
    added = note_height + 1.5 * SMALL * legend_lines + 6
    height = 72 * figure.get_figheight() + added
    figure.set_figheight(height / 72)
    figure.get_layout_engine().set(rect=(0, added / height, 1, 1 - added / height))
    figure.text(0.01, 3 / height, text, fontsize=SMALL, color=GREY, va="bottom", linespacing=1.15)
    if found:
        figure.legend(
            found.values(),
            found,
            ncols=columns,
            loc="lower center",
            bbox_to_anchor=(0.5, note_height / height),
            borderpad=0.2,
            handlelength=2.6,
            columnspacing=1.2,
        )


def save(figure: Figure, picture: Path) -> None:
    """Write a PNG, and beside it PDF and SVG: the same rows give the same bytes."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # done: once for all formats
        for suffix, metadata in METADATA.items():
            figure.savefig(picture.with_suffix(suffix), metadata=metadata)
    finally:
        plt.close(figure)


def save_with_rows(figure: Figure, picture: Path, used: Sequence[Row]) -> Path:
    """Save, and write the rows that were used beside it; returns the picture's path."""
    save(figure, picture)
    picture.with_suffix(".rows.txt").write_text(rows_used(used, picture.name))
    return picture
