"""The paper's Figure 6: how near the gradient is to the exact one, at moments of training.

A column per experiment whose backpropagation ran with diagnostics=figure6: cosine with the exact
gradient, and norm of each increment relative to it, against k, a line per moment.
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

from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.rows import Row
from scripts.figures.draw import draw_k_axis, log_axis, open_panel
from scripts.figures.style import footer, gap, panels, save_with_rows

SCORES = {"cosine": "cosine with exact", "increment": "increment / exact"}
# without the palest end, which no print shows
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](range(0, 231)))
COLUMNS = 4
MEANING = (
    "cosine with the exact gradient; increment: norm of the change since the k before, relative to "
    "the exact gradient's; networks trained by backpropagation, seeds averaged"
)


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
    if score == "increment":
        log_axis(axes)


def draw(results: Results) -> Path:
    used = [
        (paper, setting, rows)
        for paper, setting in results.chosen
        if setting and (rows := [r for r in setting.arm("bp") if "gradient_error" in r["curve"]])
    ]
    blocks = -(-len(used) // COLUMNS) or 1
    columns = -(-len(used) // blocks) or 1
    title = "Figure 6: the gradient beside the exact one, at moments of training"
    figure, axes = panels(2 * blocks, columns, 4.3 * blocks if used else 2.2, title)
    grid = axes.reshape(2 * blocks, columns)
    for part in axes:
        part.set_visible(not used)
    for number, (paper, setting, rows) in enumerate(used):
        block, column = divmod(number, columns)
        upper, lower = grid[2 * block : 2 * block + 2, column]
        for part, (score, label) in zip((upper, lower), SCORES.items(), strict=True):
            part.set_visible(True)
            draw_panel(part, moments(rows), score)
            part.set_ylabel(label if column == 0 else "")
        upper.set_xlabel("")
        open_panel(upper, paper, setting)
    if used:
        figure.colorbar(
            ScalarMappable(Normalize(0, 100), COLOURS),
            ax=list(axes),
            location="bottom",
            shrink=0.5,
            aspect=45,
            label="of training (%)",
        )
    else:
        gap(axes[0], "not run\n\npython train.py grad=bp diagnostics=figure6")
    footer(figure, (), [MEANING])
    rows = [row for _, _, found in used for row in found]
    return save_with_rows(figure, results.folder / "figures" / "figure6.png", rows)


def jobs(results: Results) -> Jobs:
    return {"figure6": partial(draw, results)}
