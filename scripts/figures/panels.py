"""Figures of panels: their layout, captions, axes and legend, and how they are saved."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from experiments.files import write_atomically, write_text
from scripts.evidence.paper import PaperRow
from scripts.evidence.rows import Row, rows_used
from scripts.evidence.settings import ENOUGH, LEVEL, Setting
from scripts.figures.style import GREY, SMALL, WIDTH

TICK_LABELS = 0.5  # inches of a panel's width that tick labels take
LINE = 1.25 * SMALL  # height of a line of small text
SMALL_TEXT = {"fontsize": SMALL, "color": GREY, "va": "bottom", "linespacing": 1.15}
BOLD = 9.0  # points: plain text of this size is as wide as a panel's bold title
LONG = 10  # largest k from which on the k axis has a square-root scale, to keep small k apart
INTERVALS = (
    f"bars: {LEVEL:.0%} interval of each mean, from {ENOUGH} seeds on; verdicts on language models "
    "compare seed by seed, so they may be surer than bars"
)
EXPLAINED = {"gamma": "Highway without a gamma: gamma = 0", "FP": "FP: fixed-point iteration"}
# no dates and no program names: the same rows give the same bytes
METADATA = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Drawing:
    """A figure, and the rows that it was drawn from, None if it shows no rows."""

    figure: Figure
    rows: Sequence[Row] | None = None

    def write(self, folder: Path, name: str) -> Path:
        """Write PNG, PDF, SVG and the list of rows; the same rows give the same bytes."""
        picture = folder / f"{name}.png"
        try:
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")  # keep this layout for all formats
            for suffix, metadata in METADATA.items():
                save = partial(self.figure.savefig, format=suffix[1:], metadata=metadata)
                write_atomically(picture.with_suffix(suffix), save)
        finally:
            plt.close(self.figure)
        if self.rows is not None:
            write_text(picture.with_suffix(".rows.txt"), rows_used(self.rows, picture.name))
        return picture


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


def one_each(
    title: str,
    shown: Sequence[tuple[PaperRow, Setting | None]],
    columns: int,
    draw: Callable[[Axes, Setting], None],
    notes: Callable[[PaperRow, Setting | None], Sequence[str]] = lambda paper, setting: (),
) -> tuple[Figure, np.ndarray]:
    """A figure with a panel per experiment, drawn if its runs have learned.

    A setting holds the rows that are drawn, and no others. ``notes`` returns more lines below a
    panel's title.
    """
    columns = min(columns, len(shown)) or 1
    lines = -(-len(shown) // columns) or 1
    figure, axes = panels(lines, columns, 2.7 * lines + 0.2, title)
    for part, (paper, setting) in zip(axes, shown, strict=False):
        if open_panel(part, paper, setting, notes(paper, setting)):
            draw(part, setting)
    for part in axes[len(shown) :]:
        part.set_visible(False)
    return figure, axes


def open_panel(
    axes: Axes, paper: PaperRow, setting: Setting | None, notes: Sequence[str] = ()
) -> bool:
    """Write a panel's title and setting; return whether there is something to draw."""
    if setting is None:
        caption(axes, paper.title, [])
        gap(axes, "not run\n\n" + paper.command.replace(".py ", ".py\n"))
        return False
    row = setting.rows[0]
    where = "the paper's own setting"
    if not setting.full:
        where = f"reduced: {setting.preset.replace('_', ' ')}"  # spaces allow line breaks
    steps = f"{row['steps']} steps of {row['batch_size']}, {seeds_of(setting)}"
    caption(axes, setting.title, [f"{where}, {setting.device}", steps, *notes])
    if not setting.arm("bp"):
        gap(axes, "no run of backpropagation\nto compare with")
    elif not setting.learned:
        gap(axes, "not learned: backpropagation is\nhardly better than a guess")
    return setting.learned


def wrapped(text: str, width: float, size: float) -> list[str]:
    """Break text into lines that fit a width in inches at a font size in points."""
    return textwrap.wrap(text, int(72 * width / (0.52 * size)), break_on_hyphens=False)


def seeds_of(setting: Setting) -> str:
    """For instance "3-5 seeds"."""
    counts = [len(rows) for rows in setting.arms.values()]
    least, most = min(counts), max(counts)
    return f"{least if least == most else f'{least}-{most}'} seed{'s' if most > 1 else ''}"


def caption(axes: Axes, title: str, lines: Sequence[str]) -> None:
    """Write a panel's title, and small lines below it, wrapped to the panel's width."""
    width = WIDTH / axes.get_subplotspec().get_gridspec().ncols - TICK_LABELS
    parts = [part for line in lines for part in wrapped(line, width, SMALL)]
    axes.set_title(
        "\n".join(wrapped(title, width, BOLD)), loc="left", weight="bold", pad=4 + LINE * len(parts)
    )
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    small = axes.annotate("\n".join(parts), (0, 1), (0, 3), **place, **SMALL_TEXT)
    small.set_in_layout(False)  # the title's pad makes room for it


def gap(axes: Axes, text: str) -> None:
    """Mark a panel without data; ``text`` says why, and which command makes the data."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="0.8", linestyle=(0, (4, 4)))
    style = {"ha": "center", "va": "center", "color": GREY, "fontsize": SMALL, "linespacing": 1.6}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)


def footer(figure: Figure, axes: Iterable[Axes], notes: Iterable[str]) -> None:
    """Add one legend of all labels in ``axes``, and notes, below the panels to cover no data."""
    found = {}
    for part in axes:
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    widest = max((len(label) for label in found), default=0)
    columns = min(len(found), int(WIDTH * 72 / (0.56 * SMALL * widest + 40))) or 1
    legend_lines = -(-len(found) // columns)
    explained = [text for name, text in EXPLAINED.items() if any(name in label for label in found)]
    lines = [line for note in (*notes, *explained) for line in wrapped(note, WIDTH, SMALL)]
    note_height = LINE * len(lines) + 4
    added = note_height + 1.5 * SMALL * legend_lines + 6
    height = 72 * figure.get_figheight() + added
    figure.set_figheight(height / 72)
    figure.get_layout_engine().set(rect=(0, added / height, 1, 1 - added / height))
    figure.text(0.01, 3 / height, "\n".join(lines), **SMALL_TEXT)
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


def k_axis(axes: Axes, ks: set[int]) -> None:
    """Set the x axis of a panel that is drawn against k."""
    if not ks:
        axes.set(xticks=[], xlabel="no run with iterations")
        return
    largest = max(ks)
    if largest >= LONG:
        axes.set_xscale("function", functions=(_root, np.square))
    axes.set_xticks(sorted(ks), sorted(ks))
    axes.set_xlim(-0.04 if largest >= LONG else -0.25, 1.05 * largest + 0.1)
    axes.set_xlabel(f"iterations k{' (square-root scale)' if largest >= LONG else ''}")


def _root(k: np.ndarray) -> np.ndarray:
    return np.sign(k) * np.sqrt(np.abs(k))


def log_axis(axes: Axes) -> None:
    """Set a logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
