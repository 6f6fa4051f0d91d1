"""Measure what the engine costs beside plain autograd: time per step, per iteration, memory.

    python scripts/bench_engine.py --out results/bench_engine.json

ResNets run in channels-last layout, as train.py does in float32. scripts/benchmark.py explains how
times and memory are measured.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.devices import keep_freed_memory
from models.resnet import ResNet
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run
from scripts.transformer_layers import sublayers

METHODS = ("bp", "k0", "k1", "k2")
RATIOS = {
    "bp_step_over_plain": "bp_step / plain_step",
    "iteration_over_input_backward": "(k2_backward - k0_backward) / 2 / plain_backward_inputs",
    "k0_backward_over_plain_backward": "k0_backward / plain_backward",
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


def measure_times(workload: str, repeats: int) -> dict[str, dict]:
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
    return benchmark.times(runs, repeats, RATIOS)


def peak_of(workload: str, method: str) -> int:
    """Peak bytes of one forward and backward pass."""
    layers, x = build(workload)
    chain = hb.ResidualChain(layers, benchmark.method_of(method))
    cotangent = torch.ones_like(chain(x))
    return benchmark.tensor_peak(lambda: chain(x).backward(cotangent))


def measure_memory(workload: str) -> dict[str, float]:
    layers, x = build(workload)
    peaks = {name: benchmark.in_a_fresh_process(peak_of, workload, name) for name in METHODS}
    record, states = {}, x.nbytes * len(layers)
    for name, peak in peaks.items():
        record[f"tensors_mb_{name}"] = peak / 1e6
        record[f"hidden_states_per_layer_above_bp_{name}"] = (peak - peaks["bp"]) / states
    return record


def main(argv: Sequence[str]) -> None:
    parser = benchmark.arguments(__doc__)
    parser.add_argument("--only", choices=WORKLOADS, help="one workload instead of all")
    args = parser.parse_args(argv)
    record = benchmark.new_record(repeats=args.repeats, workloads={})
    for workload in [args.only] if args.only else WORKLOADS:
        times, memory = measure_times(workload, args.repeats), measure_memory(workload)
        record["workloads"][workload] = times | {"memory": memory}
        benchmark.show(workload, times["ratios"] | memory)
        benchmark.save(record, args.out)


if __name__ == "__main__":
    run(main)
