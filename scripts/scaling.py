"""Hold the performance model against measured steps, then draw where which strategy wins.

    python scripts/scaling.py results/bench_sharded.json --out results

Writes figures/scaling.png and tables/scaling.md: measured beside predicted times for the processes
of the record, and predictions (no measurements) for transformers on P = 2 .. 1024 GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments.errors import UserError
from scripts.evidence.results_io import run
from scripts.figures.style import save
from scripts.scaling_model import Network
from scripts.sharding.prospects import (
    AHEAD,
    BATCHES,
    EXACT,
    MODELS,
    devices,
    networks,
    speedups,
    table,
    who_is_ahead,
)
from scripts.sharding.validation import check, measured_part

STYLES = {  # colour, line, width
    "data parallel": ("#009E73", "--", 1.4),
    "zero bubble (ZB-H1)": ("#D55E00", "-.", 1.4),
    "GPipe, 1F1B": ("#E69F00", "--", 1.4),
    "model parallel": ("black", ":", 1.0),
    "Highway k=0, micro-batches": ("#56B4E9", "-", 2.0),
    "Highway k=1, micro-batches": ("#0072B2", "-", 2.0),
    "Highway k=0": ("#56B4E9", ":", 1.0),
    "Highway k=1": ("#0072B2", ":", 1.0),
}


def page(record: dict) -> str:
    lines = [
        "# Layers on several devices: the performance model",
        "",
        *measured_part(record),
        "",
        "## Predicted speed-up over one device, not measured",
        "",
        "H100 at 40 % of its peak, NVLink up to 8 devices, 400 Gb/s InfiniBand beyond; "
        "memory is left out, so the one device may be one that could not hold the network, "
        "and so is tensor parallelism. All but data parallelism are in as many replicas as "
        "suit them best, each on two devices or more; micro-batches are four times the "
        "devices of a replica, or as many as it has sequences; Highway-BP with its batch in "
        "one piece as well. Where all take the same, it is summing gradients that takes it.",
        "",
        "### Who is ahead",
        "",
        AHEAD,
        "",
        *who_is_ahead(),
    ]
    for (title, batch), net in networks().items():
        lines += ["", f"### {title}, {batch} sequences", "", *table(net)]
    return "\n".join(lines) + "\n"


def draw(out: Path) -> None:
    figure, grid = plt.subplots(
        len(BATCHES), len(MODELS), figsize=(11, 6), sharey=True, layout="constrained"
    )
    for axes, ((title, batch), net) in zip(grid.T.flat, networks().items(), strict=True):
        draw_panel(axes, net)
        axes.set_title(f"{title},\n{batch} sequences")
    for row in grid:
        row[0].set_ylabel("speed-up over one device / P")
    for axes in grid[-1]:
        axes.set_xlabel("devices P")
    figure.legend(*grid[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        "Predicted, not measured: a training step on P devices, in as many replicas as "
        "suit best; 1 where all are fully used"
    )
    save(figure, out / "figures" / "scaling.png")


def draw_panel(axes: Axes, net: Network) -> None:
    found = {P: speedups(net, P) for P in devices(net)}
    for name, (colour, line, width) in STYLES.items():
        points = [(P, faster[name] / P) for P, faster in found.items() if name in faster]
        axes.plot(*zip(*points, strict=True), line, color=colour, lw=width, label=name, marker=".")
    best = {
        P: max(speed for name, speed in faster.items() if name in EXACT) / P
        for P, faster in found.items()
    }
    won = [
        (P, speed / P)
        for P, faster in found.items()
        for name, speed in faster.items()
        if name.startswith("Highway") and speed / P > best[P]
    ]
    axes.plot(
        [P for P, _ in won],
        [speed for _, speed in won],
        "o",
        ms=9,
        mfc="none",
        mec="0.2",
        label="Highway-BP ahead of all exact strategies",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), list(found))
    axes.set_ylim(0, 1.08)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="what scripts/bench_sharded.py wrote")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    try:
        record = json.loads(args.record.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{args.record} cannot be read ({error}); scripts/bench_sharded.py makes it"
        ) from error
    check(record)
    (args.out / "tables").mkdir(parents=True, exist_ok=True)
    (args.out / "tables" / "scaling.md").write_text(page(record))
    draw(args.out)
    print(args.out / "tables" / "scaling.md")


if __name__ == "__main__":
    run(main)
