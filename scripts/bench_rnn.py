"""Measure hb.GRU and hb.LSTM beside torch.nn's: times, where plain BPTT wins, peak memory.

    python scripts/bench_rnn.py --out results/bench_rnn.json

On a CPU: a long sequence of small steps, then a grid over batch, length, hidden size and k. On
CUDA: the paper's four shapes (Table 6), against cuDNN and against a loop over cells, the paper's
own baseline. Times are of forward and backward through the layers alone; interleaved repetitions
in one process, after a warm-up, synchronised on CUDA; a ratio is the median of the ratios inside
each repetition. Peak memory is that of a fresh process per method.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.provenance import environment
from scripts.timing import DEVICE, high_water_mark, interleaved, medians, tensor_peak, timed

CELLS = {"GRU": (nn.GRU, hb.GRU, nn.GRUCell), "LSTM": (nn.LSTM, hb.LSTM, nn.LSTMCell)}


@dataclass(frozen=True)
class Shape:
    """A network and its input (length, batch, hidden): as many inputs as hidden units."""

    cell: str
    batch: int
    length: int
    hidden: int
    layers: int = 1

    def __str__(self) -> str:
        layers = f" x{self.layers}" if self.layers > 1 else ""
        return f"{self.cell}{layers}, batch {self.batch}, L {self.length}, hidden {self.hidden}"


SMALL_STEPS = [Shape("GRU", 8, 1024, 64), Shape("GRU", 128, 1024, 64), Shape("LSTM", 8, 1024, 64)]
GRID = [Shape("GRU", b, length, h)
        for b, length, h in product((1, 8, 32), (256, 1024), (32, 64, 256))]
PAPER = [Shape("LSTM", 128, 256, 512), Shape("GRU", 128, 256, 512),
         Shape("GRU", 128, 256, 512, layers=3), Shape("GRU", 128, 1024, 64)]  # fmt: skip
KS = {"small": (0, 1, 5, 10), "grid": (0, 1, 5), "paper": (0, 1, 2, 3, 5, 10, 20)}


class CellLoop(nn.Module):
    """What the paper compares with: one cell after another, step by step."""

    def __init__(self, shape: Shape):
        super().__init__()
        cell = CELLS[shape.cell][2]
        self.cells = nn.ModuleList(
            cell(shape.hidden, shape.hidden) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for cell in self.cells:
            state, outputs = None, []
            for x_t in x:
                state = cell(x_t, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(outputs)
        return x, None


def network(shape: Shape, name: str) -> nn.Module:
    """"nn", "loop", or hb's with a method such as "k5", "k1w16" (windows), "fp5", "bptt16"."""
    torch.manual_seed(0)
    plain, ours, _ = CELLS[shape.cell]
    if name == "nn":
        return plain(shape.hidden, shape.hidden, shape.layers).to(DEVICE)
    if name == "loop":
        return CellLoop(shape).to(DEVICE)
    kind, number, window = re.fullmatch(r"([a-z]+)(\d+)(?:w(\d+))?", name).groups()
    method = {"k": hb.Highway, "fp": hb.FixedPoint, "bptt": hb.TruncatedBPTT}[kind](int(number))
    if window:
        method = replace(method, group_size=int(window))
    return ours(shape.hidden, shape.hidden, shape.layers, method=method).to(DEVICE)


def step(shape: Shape, name: str) -> Callable[[], None]:
    """Forward and backward, of the weights alone as under a first layer without gradient."""
    rnn = network(shape, name)
    x = torch.randn(shape.length, shape.batch, shape.hidden, device=DEVICE)
    cotangent = torch.randn_like(x)

    def run() -> None:
        rnn.zero_grad()
        rnn(x)[0].backward(cotangent)

    return run


def compare(shape: Shape, names: Sequence[str], repeats: int) -> dict:
    """Milliseconds of each, and how many times faster than the first of ``names`` it is."""
    steps = {name: step(shape, name) for name in names}
    seconds = interleaved({n: lambda s=s: timed(s) for n, s in steps.items()}, repeats)
    first = seconds[names[0]]
    return {
        "shape": str(shape),
        "ms": {name: 1000 * s for name, s in medians(seconds).items()},
        "speedup": {name: statistics.median(a / b for a, b in zip(first, values, strict=True))
                    for name, values in seconds.items()},
    }  # fmt: skip


def peak(shape: Shape, name: str) -> tuple[int, int]:
    """Peak bytes of one step after one to warm up (call in a fresh process): tensors, process."""
    return tensor_peak(step(shape, name)), 0 if DEVICE.type == "cuda" else high_water_mark()


def memory(shape: Shape, names: Sequence[str]) -> dict:
    """Peak megabytes of tensors made in a step, and of the whole process on a CPU."""
    found = {}
    for name in names:
        arguments = ["--peak-of", name, *map(str, astuple(shape))]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True,
                              text=True, check=True)  # fmt: skip
        tensors, process = map(int, done.stdout.split())
        found[name] = {"tensors_mb": tensors / 1e6, "process_mb": process / 1e6}
    return {"shape": str(shape), "peak": found}


def names_for(part: str) -> list[str]:
    ks = [f"k{k}" for k in KS[part]]
    others = ["fp5", "bptt16", "k1w16"]
    return ["nn", *{"small": others, "grid": [], "paper": ["loop", *others]}[part], *ks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=KS,
                        default=["paper"] if DEVICE.type == "cuda" else ["small", "grid"])
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        name, cell, *sizes = args.peak_of
        print(*peak(Shape(cell, *map(int, sizes)), name))
        return
    record: dict = {"environment": environment(DEVICE), "repeats": args.repeats}
    shapes = {"small": SMALL_STEPS, "grid": GRID, "paper": PAPER}
    for part in args.parts:
        names = names_for(part)
        record[part] = []
        for shape in shapes[part]:
            found = compare(shape, names, args.repeats)
            record[part].append(found)
            print(shape, {n: round(s, 2) for n, s in found["speedup"].items()}, flush=True)
    record["memory"] = [memory(shape, ["nn", "k0", "k5"]) for part in args.parts if part != "grid"
                        for shape in shapes[part]]
    for found in record["memory"]:
        print(found["shape"], {n: round(p["tensors_mb"]) for n, p in found["peak"].items()})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
