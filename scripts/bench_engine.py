"""Measure what the engine costs beside plain autograd: time per step, per iteration, memory.

    python scripts/bench_engine.py --out results/bench_engine.json

ResNets run in channels-last layout, as train.py runs them. scripts/benchmark.py explains how times
and memory are measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.config import composed
from experiments.malloc import keep_freed_memory
from models.resnet import ResNet
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run
from scripts.surrogate import surrogate
from scripts.transformer_layers import sublayers

METHODS = ("bp", "k0", "k1", "k2")
RATIOS: dict[str, benchmark.Ratio] = {
    "bp_step_over_plain": lambda t: t["bp_step"] / t["plain_step"],
    "iteration_over_input_backward": lambda t: (
        (t["k2_backward"] - t["k0_backward"]) / 2 / t["plain_backward_inputs"]
    ),
    "k0_backward_over_plain_backward": lambda t: t["k0_backward"] / t["plain_backward"],
}


def resnet32(preact: bool) -> tuple[nn.Module, Tensor]:
    channels_last = {"memory_format": torch.channels_last}
    chain = ResNet(depth=32, preact=preact, classes=10).chain
    x = (torch.randn if preact else torch.rand)(128, 16, 32, 32)
    return chain.to(**channels_last), x.to(**channels_last)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.ModuleList(sublayers(24, width=256, heads=4)), torch.randn(8, 256, 256)


WORKLOADS: dict[str, Callable] = {
    "resnet32_preact_b128": lambda: resnet32(preact=True),
    "resnet32_b128": lambda: resnet32(preact=False),
    "transformer24_w256_b8_t256": transformer,
}


def build(workload: str) -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    keep_freed_memory()  # as train.py does
    layers, x = WORKLOADS[workload]()
    return list(layers.to(DEVICE)), x.to(DEVICE).requires_grad_()


def measure_times(workload: str, repeats: int) -> pd.DataFrame:
    layers, x = build(workload)
    plain = nn.Sequential(*layers)
    cotangent = torch.randn_like(plain(x).detach())
    leaves = [x, *plain.parameters()]

    def step(model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            for leaf in leaves:
                leaf.grad = None
            return benchmark.timed(lambda: model(x).backward(cotangent))

        return run

    def backward(model: nn.Module, inputs: list[Tensor]) -> Callable[[], float]:
        def run() -> float:
            h = model(x)
            return benchmark.timed(lambda: torch.autograd.grad(h, inputs, cotangent))

        return run

    chains = {name: hb.ResidualChain(layers, benchmark.method_of(name)) for name in METHODS}
    runs = {"plain_step": step(plain), "bp_step": step(chains["bp"])}
    runs["plain_backward_inputs"] = backward(plain, [x])
    runs |= {f"{name}_backward": backward(chains[name], leaves) for name in ("k0", "k1", "k2")}
    runs["plain_backward"] = backward(plain, leaves)
    return benchmark.interleaved(runs, repeats)


def peaks_of(workload: str, method: str) -> tuple[int, int]:
    """`benchmark.peaks` of one forward and backward pass."""
    layers, x = build(workload)
    chain = hb.ResidualChain(layers, benchmark.method_of(method))
    cotangent = torch.ones_like(chain(x))
    return benchmark.peaks(lambda: chain(x).backward(cotangent))


def measure_memory(workload: str) -> dict[str, float]:
    layers, x = build(workload)
    found = {method: benchmark.in_a_fresh_process(peaks_of, workload, method) for method in METHODS}
    base, states = found["bp"][0], x.nbytes * len(layers)
    record = {}
    for method, (tensors, process) in found.items():
        record[f"tensors_mb_{method}"] = tensors / 1e6
        record[f"process_mb_{method}"] = process / 1e6
        record[f"hidden_states_per_layer_above_bp_{method}"] = (tensors - base) / states
    return record


def measure_data(steps: int = 50) -> dict[str, float]:
    """Time batches of 128 augmented images, and forward and backward of ResNet-32 on one batch."""
    data = surrogate(composed("data=cifar10").data, rows=50_000)
    batches = replace(data, augment=True, flip=True).train_batches(128, 0, DEVICE)
    channels_last = {"memory_format": torch.channels_last}
    model = ResNet(depth=32, preact=True, classes=10).to(DEVICE, **channels_last)
    numbers = count()

    def deliver() -> float:
        return benchmark.timed(lambda: batches.batch(next(numbers)))

    def consume() -> float:
        x, y = batches.batch(0)

        def train() -> None:
            data.task.loss(model, x.to(**channels_last), y)[0].backward()

        return benchmark.timed(train)

    batch = benchmark.interleaved({"batch": deliver}, steps).median().item()
    step = benchmark.interleaved({"step": consume}, 5).median().item()
    return {"batch": batch, "step": step, "step_over_batch": step / batch}


def main(argv: Sequence[str]) -> None:
    parser = benchmark.arguments(__doc__)
    parser.add_argument("--only", choices=WORKLOADS, help="one workload instead of all")
    args = parser.parse_args(argv)
    record = benchmark.new_record(repeats=args.repeats, workloads={})
    for workload in [args.only] if args.only else WORKLOADS:
        seconds = measure_times(workload, args.repeats)
        ratios, memory = benchmark.median_ratios(seconds, RATIOS), measure_memory(workload)
        row = {"seconds": seconds.median().to_dict(), "ratios": ratios, "memory": memory}
        record["workloads"][workload] = row
        show(workload, ratios | memory)
        benchmark.save(record, args.out)
    if not args.only:
        record["data"] = measure_data()
        show("data pipeline", record["data"])
    benchmark.save(record, args.out)


def show(title: str, values: dict[str, float]) -> None:
    print(title)
    for name, value in values.items():
        print(f"  {name:45} {value:9.4f}")


if __name__ == "__main__":
    run(main)
