"""Draw the paper's Figure 6 for every results file whose runs measured the gradient's error.

    python scripts/plot_gradient_errors.py results

NAME.jsonl gives figures/NAME.gradient.png, from the runs made with diagnostics=figure6: cosine
with the exact gradient, and norm of each increment relative to it, against k, a line per moment
of training; and beside it NAME.gradient.rows.txt. Several seeds are averaged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import pandas as pd
from matplotlib.axes import Axes

from scripts.every_source import for_every_source, run
from scripts.figure_style import save, two_panels
from scripts.rows import Row, by_method, rows_used, title

PANELS = {"cosine": "cosine with the exact gradient",
          "increment": "norm of the change since the k before / exact"}  # fmt: skip


def moments(rows: Sequence[Row]) -> pd.DataFrame:
    """Mean over seeds of every score, by (fraction of training, k)."""
    table = pd.concat(
        pd.DataFrame({**moment, "fraction": moment["step"] / row["steps"]})
        for row in rows for moment in row["curve"]["gradient_error"])  # fmt: skip
    return table.groupby(["fraction", "k"]).mean().sort_index()


def draw_panel(axes: Axes, table: pd.DataFrame, score: str) -> None:
    fractions = table.index.unique("fraction")
    for fraction in fractions:
        line = table.loc[fraction, score]
        axes.plot(line.index, line, "o-", ms=3, lw=1.3, label=f"{100 * fraction:.0f} %",
                  color=matplotlib.colormaps["viridis"](0.9 * fraction))  # fmt: skip
    axes.set_xticks(sorted(table.index.unique("k")))
    axes.set_xlabel("iterations k")
    axes.set_ylabel(PANELS[score])


def draw(rows: list[Row], name: str, results: Path) -> Path | None:
    """The picture of the best-measured method of a setup, None where none was measured."""
    rows = [row for row in rows if "gradient_error" in row["curve"]]
    if not rows:
        return None
    method, group = max(by_method(rows).items(), key=lambda item: len(item[1]))
    note = f"networks trained by {method}, {len(group)} seed{'s' if len(group) > 1 else ''}"
    figure, left, right = two_panels(title(group[0]), note)
    table = moments(group)
    draw_panel(left, table, "cosine")
    draw_panel(right, table, "increment")
    right.set_yscale("log")
    left.legend(title="of training", frameon=False, fontsize=7, title_fontsize=8, ncols=2)
    picture = results / "figures" / f"{name}.gradient.png"
    save(figure, picture)
    picture.with_suffix(".rows.txt").write_text(rows_used(group, picture))
    return picture


def main(argv: Sequence[str]) -> None:
    for_every_source(__doc__.splitlines()[0], draw, argv)


if __name__ == "__main__":
    run(main)
