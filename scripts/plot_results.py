"""Draw every results file: final score against k, and loss against training time.

    python scripts/plot_results.py results

NAME.jsonl gives figures/NAME.png and, beside it, NAME.rows.txt: the rows that were used. The
published values of published.yaml are drawn only beside complete runs (paper, Figures 2 and 3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes
from omegaconf import OmegaConf

from experiments.errors import UserError
from scripts.every_source import for_every_source, run
from scripts.figure_style import (
    LINE_STYLE,
    SERIES_COLOUR,
    SERIES_MARKER,
    draw_loss,
    save,
    two_panels,
)
from scripts.rows import (
    Row,
    by_method,
    devices_of,
    has_k,
    method_name,
    metric_of,
    order,
    read_json_lines,
    rows_used,
    score,
    series_name,
    setup_of,
)


def mean_and_deviation(rows: list[Row]) -> tuple[float, float]:
    """Final score over seeds; the deviation of a single seed is 0."""
    values = [score(row) for row in rows]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def published_for(rows: list[Row], path: Path) -> dict | None:
    """The published values for these rows' model and data; None for reduced rows."""
    if any(row["reduced"] for row in rows) or not path.exists():
        return None
    for entry in OmegaConf.to_container(OmegaConf.load(path)):
        if (entry["model"], entry["data"]) == (rows[0]["model"], rows[0]["data"]):
            return entry
    return None


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
    axes.axhline(entry["bp"], color="0.5", ls=":", label=f"published BP {entry['bp']:g}")
    axes.plot(list(entry["highway"]), list(entry["highway"].values()), "o", mfc="none",
              color="0.5", label="published Highway")


def draw(source: Path, results: Path) -> Path:
    """Draw one results file, schedules left out (plot_schedules.py); returns the picture's path."""
    rows = [row for row in read_json_lines(source) if not row.get("schedule")]
    if not rows:
        raise UserError(f"{source} is empty; expected one row per finished run")
    entry = published_for(rows, results / "published.yaml")
    note = f"times on {devices_of(rows)}"
    if entry:
        note += f"\npublished: {entry['source']}"
    figure, left, right = two_panels(setup_of(rows, source), note)
    draw_scores(left, rows)
    if entry:
        draw_published(left, entry)
    left.legend(frameon=False, fontsize=8, loc="best")
    draw_loss(right, [(row, row["curve"]["train"]) for row in sorted(rows, key=order)])
    picture = results / "figures" / f"{source.stem}.png"
    save(figure, picture)
    picture.with_suffix(".rows.txt").write_text(rows_used(rows, source, picture))
    return picture


def main(argv: Sequence[str]) -> None:
    for_every_source(__doc__.splitlines()[0], draw, argv)


if __name__ == "__main__":
    run(main)
