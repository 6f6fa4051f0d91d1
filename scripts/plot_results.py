"""Draw every results file: final score against k, and loss against training time.

    python scripts/plot_results.py results

NAME.jsonl gives figures/NAME.png and, beside it, NAME.rows.txt: the rows that were used. The
published values of paper.yaml are drawn only beside complete runs (paper, Figures 2 and 3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes

from scripts.every_source import for_every_source, run
from scripts.figure_style import (
    LINE_STYLE,
    SERIES_COLOUR,
    SERIES_MARKER,
    draw_loss,
    save,
    two_panels,
)
from scripts.paper import paper_rows
from scripts.rows import (
    Row,
    by_method,
    devices_of,
    has_k,
    method_name,
    metric_of,
    order,
    rows_used,
    score,
    series_name,
    title,
)


def mean_and_deviation(rows: list[Row]) -> tuple[float, float]:
    """Final score over seeds; the deviation of a single seed is 0."""
    values = [score(row) for row in rows]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def published_for(rows: list[Row], name: str) -> dict:
    """The published values of the paper's row ``name``; none for other and for reduced rows."""
    known = paper_rows()
    if name not in known or rows[0]["reduced"] or rows[0]["experiment"] != known[name].preset:
        return {}
    return known[name].published


def draw_scores(axes: Axes, rows: list[Row]) -> None:
    """Final score against k: a line per series, BP as a horizontal line with its deviation."""
    points: dict[str, list[tuple]] = {}
    for group in by_method(rows).values():
        first = group[0]
        points.setdefault(series_name(first), []).append((first, *mean_and_deviation(group)))
    for name, line in points.items():
        grad = line[0][0]["grad"]
        ks = [row["k"] for row, _, _ in line]
        means = [mean for _, mean, _ in line]
        deviations = [deviation for _, _, deviation in line]
        if not has_k(line[0][0]):
            label = f"{method_name(line[0][0])} {means[0]:.{metric_of(rows).digits}f}"
            axes.axhline(means[0], color=SERIES_COLOUR[grad], ls=LINE_STYLE[grad], lw=1.4,
                         label=label)
            axes.axhspan(means[0] - deviations[0], means[0] + deviations[0], color="0.85", lw=0)
            continue
        axes.errorbar(ks, means, deviations, color=SERIES_COLOUR[grad], ls=LINE_STYLE[grad],
                      marker=SERIES_MARKER[grad], capsize=3, label=name)
    axes.set_xticks(sorted({row["k"] for row in rows if has_k(row)}))
    axes.set_xlabel("iterations k")
    axes.set_ylabel(f"final {metric_of(rows).label}")


def draw_published(axes: Axes, entry: dict) -> None:
    if "bp" in entry:
        axes.axhline(entry["bp"], color="0.5", ls=":", label=f"published BP {entry['bp']:g}")
    axes.plot(list(entry["highway"]), list(entry["highway"].values()), "o", mfc="none",
              color="0.5", label="published Highway")


def draw(rows: list[Row], name: str, results: Path) -> Path | None:
    """Draw one setup, schedules left out (plot_schedules.py); returns the picture's path."""
    rows = [row for row in rows if not row["schedule"]]
    if not rows:
        return None
    entry = published_for(rows, name)
    note = f"times on {devices_of(rows)}"
    if entry:
        note += f"\npublished: {entry['source']}"
    figure, left, right = two_panels(title(rows[0]), note)
    draw_scores(left, rows)
    if entry:
        draw_published(left, entry)
    left.legend(frameon=False, fontsize=8, loc="best")
    draw_loss(right, [(row, row["curve"]["train"]) for row in sorted(rows, key=order)])
    picture = results / "figures" / f"{name}.png"
    save(figure, picture)
    picture.with_suffix(".rows.txt").write_text(rows_used(rows, picture))
    return picture


def main(argv: Sequence[str]) -> None:
    for_every_source(__doc__.splitlines()[0], draw, argv)


if __name__ == "__main__":
    run(main)
