"""Measure hb.GRU and hb.LSTM beside torch.nn's: times, where plain BPTT wins, peak memory.

    python scripts/bench_rnn.py --out results/bench_rnn.json
    python scripts/bench_rnn.py --out results/bench_rnn_cuda.json    # on a GPU

On a CPU the program measures long sequences of small steps, then a grid over batch, length, hidden
size and k; torch.nn with all threads ("nn") and with one ("nn1"), which is often faster. On CUDA,
or with --parts paper, it measures the paper's four shapes (Tables 3 and 6) against torch's own
kernel and against a loop over cells, the paper's baseline. Times are of forward and backward
through the layers alone, medians over a few processes: ratios differ more between processes than
within one. scripts/benchmark.py explains how times and memory are measured. The record is written
after every shape. `make gpu` writes it to runs/gpu; copy it to results.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.devices import prepare_torch
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run
from scripts.tables.of_timings import BASELINES

PROCESSES = 3
CELLS = {"GRU": (nn.GRU, hb.GRU, nn.GRUCell), "LSTM": (nn.LSTM, hb.LSTM, nn.LSTMCell)}


@dataclass(frozen=True)
class Shape:
    """A network and its input (length, batch, hidden). The input size is the hidden size."""

    cell: str
    batch: int
    length: int
    hidden: int
    layers: int = 1

    def __str__(self) -> str:
        layers = f" x{self.layers}" if self.layers > 1 else ""
        return f"{self.cell}{layers}, batch {self.batch}, L {self.length}, hidden {self.hidden}"


PAPER = {  # by the key of results/paper.yaml
    "lstm_chars": Shape("LSTM", 128, 256, 512),
    "gru_chars": Shape("GRU", 128, 256, 512),
    "gru_words": Shape("GRU", 128, 256, 512, layers=3),
    "gru_pixels": Shape("GRU", 128, 1024, 64),
}
SHAPES = {
    "small": [Shape("GRU", 8, 1024, 64), Shape("GRU", 128, 1024, 64), Shape("LSTM", 8, 1024, 64)],
    "grid": [
        Shape("GRU", b, length, h)
        for b, length, h in product((1, 8, 32), (256, 1024), (32, 64, 256))
    ],
    "paper": list(PAPER.values()),
    "tiny": [Shape("GRU", 2, 32, 8), Shape("LSTM", 2, 32, 8)],  # to try this program
}
NAMES = {
    "small": ["nn", "nn1", "fp5", "bptt16", "k1w16", "k0", "k1", "k5", "k10"],
    "grid": ["nn", "nn1", "k0", "k1", "k5"],
    "tiny": ["nn", "nn1", "k0", "k5", "loop"],
    "paper": [
        "nn",
        *(f"{kind}{k}" for kind in ("fp", "k") for k in (0, 1, 2, 3, 5, 10, 20)),
        "loop",
    ],
}


class CellLoop(nn.Module):
    """The paper's baseline: a loop over cells, layer by layer and step by step."""

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
    """The network of a name: torch's, "loop", or hb's with a method of `benchmark.method_of`."""
    torch.manual_seed(0)
    plain, ours, _ = CELLS[shape.cell]
    if name in BASELINES:
        return plain(shape.hidden, shape.hidden, shape.layers).to(DEVICE)
    if name == "loop":
        return CellLoop(shape).to(DEVICE)
    method = benchmark.method_of(name)
    return ours(shape.hidden, shape.hidden, shape.layers, method=method).to(DEVICE)


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """The input and the cotangent of the output, both (length, batch, hidden)."""
    torch.manual_seed(0)
    x = torch.randn(shape.length, shape.batch, shape.hidden, device=DEVICE)
    return x, torch.randn_like(x)


def step_of(shape: Shape, name: str, x: Tensor, cotangent: Tensor) -> Callable[[], None]:
    """A forward and backward pass. The input gets a gradient, as behind a projection."""
    rnn, x = network(shape, name), x.clone().requires_grad_()

    def once() -> None:
        rnn.zero_grad()
        x.grad = None
        rnn(x)[0].backward(cotangent)

    return once


def timed(name: str, step: Callable[[], None]) -> float:
    """Seconds of a step; "nn1" with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if name == "nn1" else threads)
    try:
        return benchmark.timed(step)
    finally:
        torch.set_num_threads(threads)


def compare(shape: Shape, names: Sequence[str], repeats: int, tf32: bool) -> dict:
    """Milliseconds of every network in ``names``, median, least and most, and its speedup over
    torch's own layer."""
    prepare_torch({"threads": None, "tf32": tf32, "deterministic": False})
    given = inputs(shape)
    steps = {name: step_of(shape, name, *given) for name in names}
    runs = {name: partial(timed, name, step) for name, step in steps.items()}
    # The loop comes last: its many small tensors slow down what comes next.
    last = {"loop": runs.pop("loop")} if "loop" in runs else {}
    seconds = benchmark.interleaved(runs, repeats).join(benchmark.interleaved(last, repeats))
    plain = seconds[[name for name in names if name in BASELINES]].min(axis=1)
    faster = seconds.rdiv(plain, axis=0)
    ms = {"ms": "median", "least_ms": "min", "most_ms": "max"}
    found = {key: (1000 * seconds).agg(name).to_dict() for key, name in ms.items()}
    return found | {"speedup": faster.median().to_dict()}


def in_processes(*arguments) -> dict:
    """`compare` in a few new processes, one after the other; medians over them."""
    found = [benchmark.in_a_fresh_process(compare, *arguments) for _ in range(PROCESSES)]
    return {key: pd.DataFrame([one[key] for one in found]).median().to_dict() for key in found[0]}


def megabytes(shape: Shape, name: str) -> float:
    """The peak of the tensors made in a step."""
    return benchmark.tensor_peak(step_of(shape, name, *inputs(shape))) / 1e6


def memory(shape: Shape, names: Sequence[str] = ("nn", "k0", "k5")) -> dict:
    peaks = {name: benchmark.in_a_fresh_process(megabytes, shape, name) for name in names}
    return {"peak": {name: {"tensors_mb": peak} for name, peak in peaks.items()}}


def main(argv: Sequence[str]) -> None:
    here = ["paper"] if DEVICE.type == "cuda" else ["small", "grid"]
    parser = benchmark.arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=SHAPES, default=here)
    parser.add_argument(
        "--tf32", action="store_true", help="use TF32 on CUDA, in cuDNN and in our products"
    )
    args = parser.parse_args(argv)
    record = benchmark.new_record(processes=PROCESSES, repeats=args.repeats, tf32=args.tf32)
    keys = {shape: key for key, shape in PAPER.items()}
    for part in args.parts:
        for shape in SHAPES[part]:
            about = {"row": keys.get(shape), "shape": str(shape)}
            times = in_processes(shape, NAMES[part], args.repeats, args.tf32)
            record.setdefault(part, []).append(about | times)
            if part != "grid":
                record.setdefault("memory", []).append(about | memory(shape))
            print(part, shape, {n: round(ratio, 2) for n, ratio in times["speedup"].items()})
            benchmark.save(record, args.out)


if __name__ == "__main__":
    run(main)
