"""Compare the finished runs below a folder: final score, and training loss against time.

python scripts/plot_runs.py runs/demo --out runs/demo/demo.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes

from scripts.evidence.every_source import run
from scripts.evidence.rows import (
    Row,
    by_method,
    curve,
    devices_of,
    finished_runs,
    metric_of,
    score,
    setup_of,
)
from scripts.figures.draw import SMOOTHED, draw_losses
from scripts.figures.figure_style import footer, look_of_k, panels, save


def table(rows: list[Row]) -> str:
    """One line per method: final score, training seconds, seconds relative to BP's."""
    groups = by_method(rows)
    seconds = {name: fmean(row["seconds"] for row in group) for name, group in groups.items()}
    metric = metric_of(rows)
    lines = [f"{'method':24} {'runs':>4} {metric.label:>18} {'seconds':>9} {'x BP':>6}"]
    for name, group in groups.items():
        mean = fmean(map(score, group))
        ratio = f"{seconds[name] / seconds['BP']:.2f}" if "BP" in seconds else "-"
        lines.append(
            f"{name:24} {len(group):4} {mean:18.{metric.digits}f} {seconds[name]:9.1f} {ratio:>6}"
        )
    return "\n".join(lines)


def draw_scores(axes: Axes, rows: list[Row]) -> None:
    """Every run a point, and the mean over seeds in figures."""
    groups, metric = by_method(rows), metric_of(rows)
    for x, group in enumerate(groups.values()):
        values = [score(row) for row in group]
        axes.plot([x] * len(values), values, **look_of_k(group[0]) | {"ls": ""}, ms=6)
        axes.annotate(
            f"{fmean(values):.{metric.digits}f}",
            (x, max(values)),
            (0, 6),
            ha="center",
            textcoords="offset points",
        )
    axes.margins(x=0.15, y=0.2)
    axes.set_xticks(range(len(groups)), [name.replace(" k=", "\nk=") for name in groups])
    axes.set_ylabel(f"final {metric.label}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds run folders")
    parser.add_argument("--out", type=Path, help="the picture (default: ROOT/comparison.png)")
    args = parser.parse_args(argv)
    runs = finished_runs(args.root)
    rows = [{**row, "curve": curve(row, records)} for row, records in runs]
    figure, (left, right) = panels(1, 2, 2.8, setup_of(rows, args.root))
    draw_scores(left, rows)
    draw_losses(right, rows)
    footer(figure, [right], [f"{devices_of(rows)}; {SMOOTHED}"])
    out = args.out or args.root / "comparison.png"
    save(figure, out)
    print(table(rows))
    print(f"picture: {out}")


if __name__ == "__main__":
    run(main)
