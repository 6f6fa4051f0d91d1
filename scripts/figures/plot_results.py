"""Pictures of every setup: final score against k, and loss against training time.

NAME.jsonl gives figures/NAME.png (NAME.2.png of its second setup, ...). The published values of
paper.yaml are drawn only beside complete runs. Of several devices, times are those of one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scripts.evidence.clock import about_times, axis_of, one_device
from scripts.evidence.every_source import Jobs, Results, key_of
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import Row, title
from scripts.evidence.shown import Shown
from scripts.figures.draw import BARS, SMOOTHED, draw_losses, draw_published, draw_scores
from scripts.figures.figure_style import footer, panels, save_with_rows


def draw(rows: list[Row], name: str, folder: Path) -> Path | None:
    """Draw one setup, schedules left out (plot_schedules.py); None where there are no others."""
    rows = [row for row in rows if not row["schedule"]]
    if not rows:
        return None
    figure, axes = panels(1, 2, 2.8, title(rows[0]))
    published = published_for(rows, name)
    draw_scores(axes[0], rows)
    draw_published(axes[0], published)
    timed, others = one_device(rows)
    draw_losses(axes[1], timed, x=axis_of(timed))
    footer(
        figure,
        axes,
        [
            f"times on {about_times(timed, others)}",
            SMOOTHED,
            BARS,
            f"published: {published['source']}" if published else "",
        ],
    )
    return save_with_rows(figure, folder / f"{name}.png", {name: rows})


def published_for(rows: list[Row], name: str) -> dict:
    """The published values of the paper's experiment, beside rows of its own at full length."""
    paper = paper_rows().get(key_of(name))
    return paper.published if paper and Shown(paper, name, rows).complete else {}


def jobs(results: Results) -> Jobs:
    return {
        name: partial(draw, rows, name, results.folder / "figures")
        for name, rows in results.setups.items()
    }
