"""The paper's Figures 2 and 4: final score against k, a panel per experiment.

Published values are drawn beside complete runs of the paper's own experiment; beside others they
stand in words. An experiment without rows is an empty panel with the command that makes them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.shown import Shown, shown_rows, what_ran
from scripts.figures.draw import BARS, draw_published, draw_scores
from scripts.figures.figure_style import caption, footer, gap, panels, save_with_rows

TITLES = {
    2: "Figure 2: final score against k, deep networks",
    4: "Figure 4: final score against k, recurrent networks",
}
COLUMNS = {2: 3, 4: 2}


def draw(number: int, results: Results) -> Path:
    chosen = [shown for shown in shown_rows(results).values() if shown.paper.figure == number]
    columns = COLUMNS[number]
    lines = -(-len(chosen) // columns)
    figure, axes = panels(lines, columns, 2.7 * lines + 0.2, TITLES[number] + state_of(chosen))
    for part, shown in zip(axes, chosen, strict=False):
        draw_panel(part, shown)
    for part in axes[len(chosen) :]:
        part.set_visible(False)
    footer(figure, axes, [f"{BARS}; ticks without a point: not yet run", sources_of(chosen)])
    used = {name: rows for shown in chosen for name, rows in shown.used.items()}
    return save_with_rows(figure, results.folder / "figures" / f"figure{number}.png", used)


def state_of(chosen: list[Shown]) -> str:
    """What a figure's title says where not all panels are the paper's experiments in full."""
    missing = sum(not shown.rows for shown in chosen)
    short = sum(not shown.complete for shown in chosen) - missing
    counts = {"with reduced runs or stand-ins": short, "not yet run": missing}
    parts = [
        f"{count} {state}" if len(chosen) > 1 else state for state, count in counts.items() if count
    ]
    return f" ({', '.join(parts)})" if parts else ""


def draw_panel(axes: Axes, shown: Shown) -> None:
    if not shown.rows:
        caption(axes, shown.paper.title, in_words(shown))
        gap(axes, f"not yet run\n\n{shown.paper.command}")
        return
    draw_scores(axes, shown.rows, ks_of(shown))
    if shown.complete:
        draw_published(axes, shown.paper.published)
    caption(axes, shown.paper.title, [*what_ran(shown), *in_words(shown)])


def ks_of(shown: Shown) -> set[int]:
    """Those of the paper's sweep, whether run or not."""
    sweep = shown.paper.sweep
    return set(sweep["highway"]) | set(sweep.get("fixed_point", ()))


def in_words(shown: Shown) -> list[str]:
    """The published values that are not drawn, as the runs are others."""
    published = shown.paper.published
    if shown.complete or not published:
        return []
    parts = [f"BP {published['bp']:g}"] if "bp" in published else []
    parts += [f"k={k} {value:g}" for k, value in list(published["highway"].items())[-1:]]
    return [f"paper, in full: {', '.join(parts)}"]


def sources_of(chosen: list[Shown]) -> str:
    sources = [
        f"{shown.paper.title}: {shown.paper.published['source']}"
        for shown in chosen
        if shown.paper.published
    ]
    return f"values of the paper: {'. '.join(sources)}" if sources else ""


def jobs(results: Results) -> Jobs:
    return {f"figure{number}": partial(draw, number, results) for number in TITLES}
