"""The paper's Figure 6: how near the gradient is to the exact one, at moments of training.

Every experiment whose backpropagation ran with diagnostics=figure6 has a column. Its upper panel
shows the cosine with the exact gradient against k, its lower panel the norm of each increment
relative to the exact gradient's. A line is one moment of training.
"""

from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize

from scripts.evidence.results import Results
from scripts.evidence.rows import Row, by_arm
from scripts.figures.panels import Drawing, footer, gap, k_axis, log_axis, open_panel, panels

TITLE = "Figure 6: the gradient beside the exact one, at moments of training"
# without the palest end, which is invisible in print
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](range(0, 231)))
COLUMNS = 4
MEANING = (
    "cosine with the exact gradient; increment: norm of the change since the k before (k = 0: of "
    "the gradient itself), relative to the exact gradient's; Highway-BP with gamma = 0 on networks "
    "trained by backpropagation, seeds averaged"
)


def draw(results: Results) -> Drawing:
    used = [
        (paper, replace(s, arms=by_arm(s.with_moments)))
        for paper, s in results.chosen
        if s and s.with_moments
    ]
    blocks = -(-len(used) // COLUMNS) or 1  # a block is two rows of panels
    columns = -(-len(used) // blocks) or 1
    figure, axes = panels(2 * blocks, columns, 4.3 * blocks if used else 2.2, TITLE)
    for part in axes[1:]:
        part.set_visible(False)
    grid = axes.reshape(blocks, 2, columns)
    for number, (paper, setting) in enumerate(used):
        block, column = divmod(number, columns)
        upper, lower = grid[block, :, column]
        table = moments(setting.rows)
        draw_lines(upper, table["cosine"])
        draw_lines(lower, table["increment"])
        log_axis(lower)
        upper.set_xlabel("")
        if column == 0:
            upper.set_ylabel("cosine with exact")
            lower.set_ylabel("increment / exact")
        open_panel(upper, paper, setting)
    if used:
        bar = {"location": "bottom", "shrink": 0.5, "aspect": 45, "label": "of training (%)"}
        figure.colorbar(ScalarMappable(Normalize(0, 100), COLOURS), ax=list(axes), **bar)
    else:
        gap(axes[0], "not run\n\npython train.py grad=bp diagnostics=figure6")
    footer(figure, (), [MEANING])
    return Drawing(figure, [row for _, setting in used for row in setting.rows])


def moments(rows: Sequence[Row]) -> pd.DataFrame:
    """Mean over seeds of every score, by (fraction of training, k)."""
    table = pd.concat(
        pd.DataFrame({**moment, "fraction": moment["step"] / row["steps"]})
        for row in rows
        for moment in row["curve"]["gradient_error"]
    )
    return table.groupby(["fraction", "k"]).mean().sort_index()


def draw_lines(axes: Axes, scores: pd.Series) -> None:
    """Draw scores against k, a line per moment."""
    axes.set_visible(True)
    for fraction, line in scores.groupby("fraction"):
        style = {"ms": 2.5, "lw": 1, "color": COLOURS(float(fraction))}
        axes.plot(line.index.get_level_values("k"), line, "o-", **style)
    k_axis(axes, set(scores.index.unique("k")))
