"""Losses during training: the paper's Figures 3 and 5, and loss against time for every experiment.

figure3: GPT-2's validation loss against steps and against time, a line per k. figure5: the
three-layer GRU's losses against time. time: training loss against time, a panel per experiment.
Times in a panel are of one device; of Highway-BP one gamma is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from scripts.evidence.clock import about_times, axis_of, one_device
from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.rows import METHOD_NAMES, Row, has_k
from scripts.evidence.shown import METHODS, Shown, shown_rows, what_ran
from scripts.figures.draw import SEEDS, SMOOTHED, draw_losses
from scripts.figures.figure_style import caption, footer, gap, panels, save_with_rows
from scripts.figures.plot_paper import state_of


@dataclass(frozen=True)
class Pair:
    """Two panels of one experiment's losses: (part of the curve, "step" or "time") each."""

    name: str
    key: str
    heading: str
    panels: tuple[tuple[str, str], tuple[str, str]]


PAIRS = [
    Pair(
        "figure3",
        "gpt2",
        "Figure 3: validation loss of GPT-2 during training",
        (("eval", "step"), ("eval", "time")),
    ),
    Pair(
        "figure5",
        "gru_words",
        "Figure 5: loss of the 3-layer GRU against time",
        (("train", "time"), ("eval", "time")),
    ),
]


def timed(shown: Shown, methods: Sequence[str] = METHODS) -> tuple[Shown, int]:
    """What may be compared by time: one device, one gamma; and how many rows are of others."""
    here, others = one_device([row for row in shown.rows if row["grad"] in methods])
    return replace(shown, rows=replace(shown, rows=here).main()), others


def draw_pair(pair: Pair, results: Results) -> Path:
    shown = shown_rows(results)[pair.key]
    found, others = timed(shown)
    figure, axes = panels(1, 2, 2.9, pair.heading + state_of([shown]))
    for axis, (part, x) in zip(axes, pair.panels, strict=True):
        draw_panel(axis, found, part, x)
    caption(axes[0], shown.paper.title, what_ran(shown))
    caption(axes[1], "", about_lines(shown, found, others))
    footer(figure, axes, [SMOOTHED if "train" in dict(pair.panels) else SEEDS])
    return save_with_rows(figure, results.folder / "figures" / f"{pair.name}.png", found.used)


def draw_time(results: Results) -> Path:
    """Training loss against time: a panel per experiment, without the fixed point."""
    methods = ("bp", "highway")
    chosen = list(shown_rows(results).values())
    figure, axes = panels(3, 3, 8.1, f"Training loss against time{state_of(chosen)}")
    used = {}
    for axis, shown in zip(axes, chosen, strict=True):
        found, others = timed(shown, methods)
        draw_panel(axis, found, "train", "time")
        lines = [*what_ran(shown, methods), *about_lines(shown, found, others)]
        caption(axis, shown.paper.title, lines)
        used |= found.used
    footer(
        figure,
        axes,
        [
            "time: wall-clock of training steps; where other work slowed single-threaded runs, the "
            "processor's",
            f"{SMOOTHED}; fixed point: in the pictures of single experiments",
        ],
    )
    return save_with_rows(figure, results.folder / "figures" / "time.png", used)


def draw_panel(axes: Axes, found: Shown, part: str, x: str) -> None:
    if not found.rows:
        gap(axes, f"not yet run\n\n{found.paper.command}")
        return
    draw_losses(
        axes,
        [{**row, "gamma": None} for row in found.rows],
        part,
        axis_of(found.rows) if x == "time" else x,
        without_gamma,
    )


def without_gamma(row: Row) -> str:
    """The line's name; the panel says which gamma it is."""
    return METHOD_NAMES[row["grad"]] + (f" k={row['k']}" if has_k(row) else "")


def about_lines(shown: Shown, found: Shown, others: int) -> list[str]:
    """What a reader must know of gamma and of times."""
    return [*about_gamma(shown, found), about_times(found.rows, others)] if found.rows else []


def about_gamma(shown: Shown, found: Shown) -> list[str]:
    """Which gamma Highway-BP's lines are of, where that is not plain; others have their picture."""
    several = len(shown.gammas()) > 1
    elsewhere = f", others in {shown.name}.png" if several else ""
    return [f"gamma = {found.gamma()}{elsewhere}"] if several or found.gamma() else []


def jobs(results: Results) -> Jobs:
    pairs = {pair.name: partial(draw_pair, pair, results) for pair in PAIRS}
    return pairs | {"time": partial(draw_time, results)}
