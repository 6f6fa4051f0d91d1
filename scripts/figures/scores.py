"""The paper's Figures 2 and 4: final score against k, a panel per experiment."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from scripts.evidence.paper import PaperRow
from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.settings import Setting
from scripts.figures.draw import INTERVALS, draw_published, draw_scores, open_panel
from scripts.figures.style import footer, panels, save_with_rows

TITLES = {
    2: "Figure 2: final score against k, deep networks",
    4: "Figure 4: final score against k, recurrent networks",
}
COLUMNS = {2: 3, 4: 2}


def draw(number: int, results: Results) -> Path:
    chosen = [(paper, setting) for paper, setting in results.chosen if paper.figure == number]
    columns = COLUMNS[number]
    lines = -(-len(chosen) // columns)
    figure, axes = panels(lines, columns, 2.7 * lines + 0.2, TITLES[number])
    for part, (paper, setting) in zip(axes, chosen, strict=False):
        draw_panel(part, paper, setting)
    for part in axes[len(chosen) :]:
        part.set_visible(False)
    footer(figure, axes, [INTERVALS, sources_of([paper for paper, _ in chosen])])
    used = [row for _, setting in chosen if setting for row in setting.rows]
    return save_with_rows(figure, results.folder / "figures" / f"figure{number}.png", used)


def draw_panel(axes: Axes, paper: PaperRow, setting: Setting | None) -> None:
    if not open_panel(axes, paper, setting, in_words(paper, setting)):
        return
    draw_scores(axes, setting, [arm for arm in setting.arms if arm.plain])
    if setting.full:
        draw_published(axes, paper.published)


def in_words(paper: PaperRow, setting: Setting | None) -> list[str]:
    """The published values that are not drawn, as the runs are others."""
    published = paper.published
    if not published or (setting and setting.full):
        return []
    parts = [f"BP {published['bp']:g}"] if "bp" in published else []
    parts += [f"k={k} {value:g}" for k, value in list(published["highway"].items())[-1:]]
    return [f"paper, in full: {', '.join(parts)}"]


def sources_of(papers: list[PaperRow]) -> str:
    sources = [f"{p.title}: {p.published['source']}" for p in papers if p.published]
    return f"values of the paper: {'. '.join(sources)}" if sources else ""


def jobs(results: Results) -> Jobs:
    return {f"figure{number}": partial(draw, number, results) for number in TITLES}
