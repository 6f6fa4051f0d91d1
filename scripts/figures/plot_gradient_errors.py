"""The paper's Figure 6: how near the gradient is to the exact one, at moments of training.

NAME.jsonl gives figures/NAME.gradient.png if it has runs made with diagnostics=figure6: cosine with
the exact gradient, and norm of each increment relative to it, against k, a line per moment;
figure6.png has them all side by side, a column per experiment. Several seeds are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize

from scripts.evidence.every_source import Jobs, Results, key_of
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import Row, by_method, title
from scripts.evidence.shown import heading_of, in_full
from scripts.figures.draw import draw_k_axis, log_axis
from scripts.figures.figure_style import caption, footer, gap, panels, save_with_rows

SCORES = {"cosine": "cosine with exact", "increment": "increment / exact"}
# without the palest end, which no print shows
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](range(0, 231)))
COLUMNS = 4
MEANING = (
    "cosine with the exact gradient; increment: norm of the change since the k before, "
    "relative to the exact gradient's"
)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The runs of the best-measured method of a setup; empty where none was measured."""
    groups = by_method(row for row in rows if "gradient_error" in row["curve"])
    return max(groups.values(), key=len, default=[])


def moments(rows: Sequence[Row]) -> pd.DataFrame:
    """Mean over seeds of every score, by (fraction of training, k)."""
    table = pd.concat(
        pd.DataFrame({**moment, "fraction": moment["step"] / row["steps"]})
        for row in rows
        for moment in row["curve"]["gradient_error"]
    )
    return table.groupby(["fraction", "k"]).mean().sort_index()


def draw_panel(axes: Axes, table: pd.DataFrame, score: str) -> None:
    for fraction in table.index.unique("fraction"):
        line = table.loc[fraction, score]
        axes.plot(line.index, line, "o-", ms=2.5, lw=1, color=COLOURS(float(fraction)))
    draw_k_axis(axes, set(table.index.unique("k")))
    axes.set_ylabel(SCORES[score])
    if score == "increment":
        log_axis(axes)


def draw_moments_bar(figure, axes: Sequence[Axes]) -> None:
    figure.colorbar(
        ScalarMappable(Normalize(0, 100), COLOURS),
        ax=list(axes),
        location="bottom",
        shrink=0.5,
        aspect=45,
        label="of training (%)",
    )


def note_on(group: Sequence[Row]) -> str:
    seeds = f"{len(group)} seed{'s' if len(group) > 1 else ''}"
    return f"networks trained by {next(iter(by_method(group)))}, {seeds}"


def draw(rows: list[Row], name: str, folder: Path) -> Path | None:
    """The picture of one setup, None where none of its runs was measured."""
    group = measured(rows)
    if not group:
        return None
    figure, axes = panels(1, 2, 3.1, title(group[0]))
    table = moments(group)
    for part, score in zip(axes, SCORES, strict=True):
        draw_panel(part, table, score)
    draw_moments_bar(figure, axes)
    footer(figure, (), [f"{note_on(group)}; {MEANING}"])
    return save_with_rows(figure, folder / f"{name}.gradient.png", {name: group})


def draw_all(results: Results) -> Path:
    """Figure 6: a column per experiment, at most COLUMNS side by side."""
    used = best_measured(results)
    blocks = -(-len(used) // COLUMNS) or 1
    columns = -(-len(used) // blocks) or 1
    short = any(not in_full(group[0], key_of(name)) for name, group in used.items())
    figure, axes = panels(
        2 * blocks,
        columns,
        4.3 * blocks if used else 2.2,
        "Figure 6: the gradient beside the exact one, at moments of training"
        f"{' (with reduced runs or stand-ins)' if short else ''}",
    )
    grid = axes.reshape(2 * blocks, columns)
    for part in axes:
        part.set_visible(not used)
    for number, (name, group) in enumerate(used.items()):
        block, column = divmod(number, columns)
        draw_column(grid[2 * block : 2 * block + 2, column], name, group, labelled=column == 0)
    if used:
        draw_moments_bar(figure, axes)
    else:
        gap(axes[0], "not yet run\n\npython train.py grad=bp diagnostics=figure6")
    footer(figure, (), [f"{MEANING}; seeds averaged"])
    return save_with_rows(figure, results.folder / "figures" / "figure6.png", used)


def draw_column(column: Sequence[Axes], name: str, group: list[Row], labelled: bool) -> None:
    table = moments(group)
    for part, score in zip(column, SCORES, strict=True):
        part.set_visible(True)
        draw_panel(part, table, score)
        part.set_ylabel(SCORES[score] if labelled else "")
    column[0].set_xlabel("")
    heading, lines = heading_of(group[0], key_of(name))
    caption(column[0], heading, [*lines, note_on(group)])


def best_measured(results: Results) -> dict[str, list[Row]]:
    """Of every file the fullest setup with measured runs: in Table 2's order, others behind."""
    order = list(paper_rows())
    found: dict[str, tuple[str, list[Row]]] = {}
    for name, rows in results.setups.items():
        if group := measured(rows):
            found.setdefault(key_of(name), (name, group))
    keys = sorted(found, key=lambda key: order.index(key) if key in order else len(order))
    return dict(found[key] for key in keys)


def jobs(results: Results) -> Jobs:
    folder = results.folder / "figures"
    return {"figure6": partial(draw_all, results)} | {
        f"{name}.gradient": partial(draw, rows, name, folder)
        for name, rows in results.setups.items()
    }
