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

from experiments.errors import UserError
from scripts.evidence.every_source import run
from scripts.figures.figure_style import save
from scripts.scaling_model import STRATEGIES, Link, Network, transformer
from scripts.sharding.validation import check, measured_part

H100 = 0.4 * 989e12  # bfloat16 operations per second, of which 40 % are commonly reached
NVLINK, INFINIBAND = Link(5e-6, 450e9), Link(10e-6, 50e9)  # one direction, published
GPUS_PER_NODE = 8
MODELS = {  # layers, width, length; L of Highway-BP counts sublayers, a stage has whole layers here
    "the paper's GPT-2 (12 layers, width 256)": (12, 256, 256),
    "RoBERTa-base (12 layers, width 768)": (12, 768, 128),
    "7B decoder (32 layers, width 4096)": (32, 4096, 4096),
    "70B decoder (80 layers, width 8192)": (80, 8192, 4096),
}
BATCHES = (8, 512)  # sequences
STYLES = {
    "model parallel": ("black", ":"), "GPipe, 1F1B": ("#E69F00", "--"),
    "zero bubble (ZB-H1)": ("#D55E00", "-."), "data parallel": ("#009E73", "--"),
    "Highway k=0": ("#56B4E9", "-"), "Highway k=1": ("#0072B2", "-"),
    "Highway k=0, micro-batches": ("#56B4E9", ":"),
    "Highway k=1, micro-batches": ("#0072B2", ":"),
}  # fmt: skip


def link_for(P: int) -> Link:
    return NVLINK if P <= GPUS_PER_NODE else INFINIBAND


def speedups(net: Network, P: int) -> dict[str, float]:
    """Times faster than one device, of the strategies that can use P devices."""
    found = {}
    for name, seconds in STRATEGIES.items():
        fits = net.batch >= P if name == "data parallel" else P <= net.L
        if fits:
            micro = min(net.batch, 4 * P)
            found[name] = net.step / seconds(net, P, link_for(P), micro)
    return found


def page(record: dict) -> str:
    lines = ["# Layers on several devices: the performance model", "", *measured_part(record), "",
             "## Predicted speed-up over one device, not measured", "",
             "H100 at 40 % of its peak, NVLink up to 8 devices, 400 Gb/s InfiniBand beyond; "
             "memory is left out, so the one device may be one that could not hold the network. "
             "Micro-batches are 4 P, or as many as there are sequences; Highway-BP with its batch "
             "in one piece as well.", ""]
    for title, (layers, width, length) in MODELS.items():
        for batch in BATCHES:
            lines += [f"### {title}, {batch} sequences", ""]
            lines += [*table(transformer(layers, width, length, batch, H100)), ""]
    return "\n".join(lines).rstrip() + "\n"


def devices(net: Network) -> list[int]:
    most = max(net.L, net.batch)
    return [P for P in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if most >= P]


def table(net: Network) -> list[str]:
    Ps = devices(net)
    found = {P: speedups(net, P) for P in Ps}
    lines = ["| P | " + " | ".join(map(str, Ps)) + " |", "|---" * (len(Ps) + 1) + "|"]
    for name in STRATEGIES:
        cells = [f"{found[P][name]:.1f}" if name in found[P] else "-" for P in Ps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(out: Path) -> None:
    figure, grid = plt.subplots(len(BATCHES), len(MODELS), figsize=(13, 6.4), sharey=True,
                                layout="constrained")  # fmt: skip
    for row, batch in zip(grid, BATCHES, strict=True):
        for axes, (title, (layers, width, length)) in zip(row, MODELS.items(), strict=True):
            net = transformer(layers, width, length, batch, H100)
            for name, (colour, line) in STYLES.items():
                points = [(P, speedups(net, P)[name]) for P in devices(net)
                          if name in speedups(net, P)]  # fmt: skip
                axes.plot(*zip(*points, strict=True), line, color=colour, label=name, marker=".")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(f"{title},\n{batch} sequences", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92")
        row[0].set_ylabel("times faster than one device")
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8,
                  frameon=False, fontsize=8)  # fmt: skip
    figure.suptitle("Predicted, not measured: a training step on P devices")
    save(figure, out / "figures" / "scaling.png")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="what scripts/bench_sharded.py wrote")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    try:
        record = json.loads(args.record.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{args.record} cannot be read ({error}); scripts/bench_sharded.py "
                        "makes it") from error  # fmt: skip
    check(record)
    (args.out / "tables").mkdir(parents=True, exist_ok=True)
    (args.out / "tables" / "scaling.md").write_text(page(record))
    draw(args.out)
    print(args.out / "tables" / "scaling.md")


if __name__ == "__main__":
    run(main)
