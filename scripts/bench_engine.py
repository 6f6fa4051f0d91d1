"""Measure what the engine costs beside plain autograd: time per step, per iteration, memory.

    python scripts/bench_engine.py --out results/bench_engine.json

ResNets run in channels-last layout, as train.py runs them. Times are medians of interleaved
repetitions in one process, after a warm-up, synchronised on CUDA; a ratio is the median of the
ratios inside each repetition, so that the machine's drift cancels. Peak memory is that of a
fresh process per method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.data.batches import TrainBatches
from experiments.data.images import ImageData
from experiments.malloc import keep_freed_memory
from experiments.provenance import environment
from experiments.tasks import Classification
from models.resnet import ResNet
from scripts.timing import (
    DEVICE,
    Seconds,
    high_water_mark,
    interleaved,
    medians,
    tensor_peak,
    timed,
)
from scripts.transformer_layers import sublayers

METHODS = {
    "bp": hb.Backprop(),
    "k0": hb.Highway(0),
    "k1": hb.Highway(1),
    "k2": hb.Highway(2),
}


def resnet32() -> tuple[list[nn.Module], Tensor]:
    chain = ResNet(depth=32, preact=True, classes=10).chain
    return channels_last(chain), channels_last(torch.randn(128, 16, 32, 32))


def resnet32_relu() -> tuple[list[nn.Module], Tensor]:
    chain = ResNet(depth=32, preact=False, classes=10).chain
    return channels_last(chain), channels_last(torch.rand(128, 16, 32, 32))


def channels_last(what: Any) -> Any:
    return what.to(memory_format=torch.channels_last)


def transformer() -> tuple[list[nn.Module], Tensor]:
    return sublayers(24, width=256, heads=4), torch.randn(8, 256, 256)


WORKLOADS: dict[str, Callable] = {
    "resnet32_preact_b128": resnet32,
    "resnet32_b128": resnet32_relu,
    "transformer24_w256_b8_t256": transformer,
}


def build(workload: str) -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    keep_freed_memory()  # as train.py does
    layers, x = WORKLOADS[workload]()
    return [layer.to(DEVICE) for layer in layers], x.to(DEVICE).requires_grad_()


def measure_times(workload: str, repeats: int) -> Seconds:
    layers, x = build(workload)
    plain = nn.Sequential(*layers)
    cotangent = torch.randn_like(plain(x).detach())
    leaves = [x, *plain.parameters()]

    def step(model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            for leaf in leaves:
                leaf.grad = None
            return timed(lambda: model(x).backward(cotangent))

        return run

    def backward(model: nn.Module, inputs: list[Tensor]) -> Callable[[], float]:
        def run() -> float:
            h = model(x)
            return timed(lambda: torch.autograd.grad(h, inputs, cotangent))

        return run

    chains = {name: hb.ResidualChain(layers, method) for name, method in METHODS.items()}
    runs = {"plain_step": step(plain), "bp_step": step(chains["bp"])}
    runs["plain_backward_inputs"] = backward(plain, [x])
    for name in ("k0", "k1", "k2"):
        runs[f"{name}_backward"] = backward(chains[name], leaves)
    runs["plain_backward"] = backward(plain, leaves)
    return interleaved(runs, repeats)


def time_ratios(seconds: Seconds) -> dict[str, float]:
    columns = zip(*seconds.values(), strict=True)
    rounds = [dict(zip(seconds, column, strict=True)) for column in columns]
    return {name: statistics.median(ratio(r) for r in rounds) for name, ratio in RATIOS.items()}


RATIOS: dict[str, Callable[[dict[str, float]], float]] = {
    "bp_step_over_plain": lambda t: t["bp_step"] / t["plain_step"],
    "iteration_over_input_backward": lambda t: (
        (t["k2_backward"] - t["k0_backward"]) / 2 / t["plain_backward_inputs"]
    ),
    "k0_backward_over_plain_backward": lambda t: t["k0_backward"] / t["plain_backward"],
}


def peaks(workload: str, method: str) -> tuple[int, int]:
    """Bytes at the peak of one forward and backward pass, after one to warm up, in this process
    (call in a fresh one): of tensors, and of the whole process on a CPU."""
    layers, x = build(workload)
    chain = hb.ResidualChain(layers, METHODS[method])
    cotangent = torch.ones_like(chain(x))

    def step() -> None:
        chain(x).backward(cotangent)

    return tensor_peak(step), 0 if DEVICE.type == "cuda" else high_water_mark()


def measure_memory(workload: str) -> dict[str, float]:
    record = {}
    layers, x = build(workload)
    base = 0
    for method in METHODS:
        command = [sys.executable, __file__, "--peaks-of", workload, method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        tensors, process = map(int, done.stdout.split())
        base = base or tensors  # bp comes first
        record[f"tensors_mb_{method}"] = tensors / 1e6
        record[f"process_mb_{method}"] = process / 1e6
        record[f"hidden_states_per_layer_above_bp_{method}"] = (tensors - base) / (
            x.nbytes * len(layers)
        )
    return record


def measure_data(steps: int = 50) -> dict[str, float]:
    """CIFAR-10-sized batches of 128, augmented, beside a training step of ResNet-32 (preact)."""
    noise = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (50_000,))
    data = ImageData(
        name="noise",
        train_images=noise,
        train_labels=labels,
        test_images=noise[:1],
        test_labels=labels[:1],
        classes=10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=True,
        flip=True,
    )
    batches = TrainBatches(data, 128, seed=0, device=DEVICE)
    model = channels_last(ResNet(depth=32, preact=True, classes=10)).to(DEVICE)
    numbers = iter(range(10**6))

    def deliver() -> float:
        return timed(lambda: batches.batch(next(numbers)))

    def consume() -> float:
        x, y = batches.batch(0)
        return timed(lambda: Classification().loss(model, channels_last(x), y)[0].backward())

    seconds = medians(interleaved({"batch": deliver}, steps) | interleaved({"step": consume}, 5))
    return {**seconds, "step_over_batch": seconds["step"] / seconds["batch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=WORKLOADS, help="one workload instead of all")
    parser.add_argument(
        "--peaks-of", nargs=2, metavar=("WORKLOAD", "METHOD"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.peaks_of:
        print(*peaks(*args.peaks_of))
        return
    record: dict = {"environment": environment(DEVICE), "repeats": args.repeats, "workloads": {}}
    for workload in [args.only] if args.only else WORKLOADS:
        seconds = measure_times(workload, args.repeats)
        row = {
            "seconds": medians(seconds),
            "ratios": time_ratios(seconds),
            "memory": measure_memory(workload),
        }
        record["workloads"][workload] = row
        print(workload)
        for name, value in {**row["ratios"], **row["memory"]}.items():
            print(f"  {name:45} {value:9.3f}")
    if not args.only:
        record["data"] = measure_data()
        print("data pipeline")
        for name, value in record["data"].items():
            print(f"  {name:45} {value:9.4f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
