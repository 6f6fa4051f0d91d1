"""Measure hb.GRU and hb.LSTM beside torch.nn's: times, where plain BPTT wins, peak memory.

    python scripts/bench_rnn.py --out results/bench_rnn.json
    python scripts/bench_rnn.py --parts paper --resume --out results/bench_rnn_paper.json

On a CPU: a long sequence of small steps, then a grid over batch, length, hidden size and k. On
CUDA, or with --parts paper: the paper's four shapes (Tables 3 and 6), against torch's own kernel
and against a loop over cells, the paper's baseline. Times are of forward and backward through the
layers alone; interleaved repetitions in one process, after a warm-up, synchronised on CUDA; a ratio
is the median of the ratios inside each repetition. Peak memory is that of a fresh process per
method. The record is written after every shape; --resume leaves out what it has.
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
from experiments.atomic import write_text
from experiments.errors import UserError
from experiments.provenance import environment
from experiments.run import prepare_torch
from scripts.program import run
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
GRID = [
    Shape("GRU", b, length, h) for b, length, h in product((1, 8, 32), (256, 1024), (32, 64, 256))
]
PAPER = {  # by the key of results/paper.yaml
    "lstm_chars": Shape("LSTM", 128, 256, 512),
    "gru_chars": Shape("GRU", 128, 256, 512),
    "gru_words": Shape("GRU", 128, 256, 512, layers=3),
    "gru_pixels": Shape("GRU", 128, 1024, 64),
}
SHAPES = {"small": SMALL_STEPS, "grid": GRID, "paper": list(PAPER.values())}
KS = {"small": (0, 1, 5, 10), "grid": (0, 1, 5), "paper": (0, 1, 2, 3, 5, 10, 20)}
OTHERS = {
    "small": ["fp5", "bptt16", "k1w16"],
    "grid": [],
    "paper": ["loop", *(f"fp{k}" for k in KS["paper"])],
}
MAY_DIFFER = ("commit", "dirty")  # between parts of one record


class CellLoop(nn.Module):
    """What the paper compares with: one cell after another, step by step."""

    def __init__(self, shape: Shape):
        super().__init__()
        cell = CELLS[shape.cell][2]
        self.cells = nn.ModuleList(cell(shape.hidden, shape.hidden) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for cell in self.cells:
            state, outputs = None, []
            for x_t in x:
                state = cell(x_t, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(outputs)
        return x, None


def network(shape: Shape, name: str) -> nn.Module:
    """ "nn", "loop", or hb's with a method such as "k5", "k1w16" (windows), "fp5", "bptt16"."""
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


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """What goes in, and the gradient of what comes out."""
    torch.manual_seed(0)
    x = torch.randn(shape.length, shape.batch, shape.hidden, device=DEVICE)
    return x, torch.randn_like(x)


def step(shape: Shape, name: str, x: Tensor, cotangent: Tensor) -> Callable[[], None]:
    """Forward and backward, of the weights alone as under a first layer without gradient."""
    rnn = network(shape, name)

    def once() -> None:
        rnn.zero_grad()
        rnn(x)[0].backward(cotangent)

    return once


def compare(shape: Shape, names: Sequence[str], repeats: int) -> dict:
    """Milliseconds of each, and how many times faster than the first of ``names`` it is."""
    given = inputs(shape)
    steps = {name: step(shape, name, *given) for name in names}
    seconds = interleaved({n: lambda s=s: timed(s) for n, s in steps.items()}, repeats)
    first = seconds[names[0]]
    return {
        "shape": str(shape),
        "ms": {name: 1000 * s for name, s in medians(seconds).items()},
        "speedup": {
            name: statistics.median(a / b for a, b in zip(first, values, strict=True))
            for name, values in seconds.items()
        },
    }


def peak(shape: Shape, name: str) -> tuple[int, int]:
    """Peak bytes of one step after one to warm up (call in a fresh process): tensors, process."""
    peak_of_tensors = tensor_peak(step(shape, name, *inputs(shape)))
    return peak_of_tensors, 0 if DEVICE.type == "cuda" else high_water_mark()


def memory(shape: Shape, names: Sequence[str]) -> dict:
    """Peak megabytes of tensors made in a step, and of the whole process on a CPU."""
    found = {}
    for name in names:
        if DEVICE.type == "cuda":  # its allocator is told apart in one process
            found[name] = {"tensors_mb": peak(shape, name)[0] / 1e6, "process_mb": 0.0}
            continue
        arguments = ["--peak-of", name, *map(str, astuple(shape))]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        tensors, process = map(int, done.stdout.split())
        found[name] = {"tensors_mb": tensors / 1e6, "process_mb": process / 1e6}
    return {"shape": str(shape), "peak": found}


def names_for(part: str) -> list[str]:
    return ["nn", *OTHERS[part], *(f"k{k}" for k in KS[part])]


def row_of(shape: Shape) -> str | None:
    """The paper's experiment a shape is of, by its key."""
    return next((key for key, paper in PAPER.items() if paper == shape), None)


def begun(out: Path | None, repeats: int, resume: bool, tf32: bool) -> dict:
    """The record to go on with: what ``out`` has, or an empty one.

    Raises:
        UserError: what is there was measured elsewhere, by another torch or otherwise.
    """
    record = {"environment": environment(DEVICE), "repeats": repeats, "tf32": tf32}
    if not (resume and out and out.exists()):
        return record
    there = json.loads(out.read_text())
    for old, new in ((there["environment"], record["environment"]), (there, record)):
        differing = [
            key
            for key in new
            if key not in MAY_DIFFER and key != "environment" and old[key] != new[key]
        ]
        if differing:
            raise UserError(
                f"{out} was measured with {differing[0]} {old[differing[0]]}, this is "
                f"{new[differing[0]]}; choose another --out"
            )
    return there


def measure(
    record: dict,
    part: str,
    shapes: Sequence[Shape],
    names: Sequence[str],
    save: Callable[[], None],
) -> None:
    """Add the times, then the peak memory, of every shape that the record does not have."""
    parts = {part: lambda shape: compare(shape, names, record["repeats"])}
    if part != "grid":
        parts["memory"] = lambda shape: memory(shape, ["nn", "k0", "k5"])
    order = list(map(str, SHAPES[part]))
    for name, measured in parts.items():
        found = record.setdefault(name, [])
        for shape in shapes:
            if str(shape) in {entry["shape"] for entry in found}:
                print(f"{name}, {shape}: there already", flush=True)
                continue
            entry = {
                "row": row_of(shape),
                **measured(shape),
                "commit": environment(DEVICE)["commit"],
            }
            found.append(entry)
            if name == part:  # the record's order is that of the shapes, whatever came first
                found.sort(key=lambda entry: order.index(entry["shape"]))
            save()
            print(name, shape, _in_short(entry), flush=True)


def _in_short(entry: dict) -> dict:
    if "speedup" in entry:
        return {name: round(value, 2) for name, value in entry["speedup"].items()}
    return {name: round(value["tensors_mb"]) for name, value in entry["peak"].items()}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=KS,
        default=["paper"] if DEVICE.type == "cuda" else ["small", "grid"],
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=PAPER,
        default=list(PAPER),
        help='of the part "paper", the shapes of these experiments alone',
    )
    parser.add_argument("--names", nargs="+", help='these alone, such as "nn k0 k5 fp5"')
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has and measure the rest"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="on CUDA, in cuDNN and in our products alike"
    )
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak_of:
        name, cell, *sizes = args.peak_of
        print(*peak(Shape(cell, *map(int, sizes)), name))
        return
    record = begun(args.out, args.repeats, args.resume, args.tf32)
    prepare_torch({"threads": None, "tf32": args.tf32, "deterministic": False})

    def save() -> None:
        if args.out:
            write_text(args.out, json.dumps(record, indent=1) + "\n")

    for part in args.parts:
        shapes = [PAPER[key] for key in args.rows] if part == "paper" else SHAPES[part]
        measure(record, part, shapes, args.names or names_for(part), save)


if __name__ == "__main__":
    run(main)
