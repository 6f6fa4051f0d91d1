"""Measure what `hb.convert` costs on a GPT-2 of transformers, beside the model as it was.

    python scripts/bench_trunk.py --out results/bench_trunk.json

The paper's GPT-2 (12 layers of width 256, 256 tokens), batch 4. How times and memory are measured:
scripts/benchmark.py.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.malloc import keep_freed_memory
from models.pretrained import quiet_transformers
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run

VOCABULARY, BATCH, LENGTH, WIDTH, LAYERS = 4096, 4, 256, 256, 12
EVERY = hb.AutoGamma().every
RATIOS: dict[str, benchmark.Ratio] = {
    "converted_bp_over_plain": lambda t: t["bp"] / t["plain"],
    "k0_over_plain": lambda t: t["k0"] / t["plain"],
    "k1_over_plain": lambda t: t["k1"] / t["plain"],
    "k3_over_plain": lambda t: t["k3"] / t["plain"],
    "iteration_over_trunk_input_backward": lambda t: (
        (t["k3"] - t["k0"]) / 3 / t["trunk_input_backward"]
    ),
    "share_of_auto_gamma": lambda t: (t["k1_estimating"] - t["k1"]) / EVERY / t["k1"],
}


def gpt2_and_tokens() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    transformers = quiet_transformers()
    sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, **sizes, **no_dropout, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).to(DEVICE).train()
    return model, torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)


def forward_and_backward(model: nn.Module, x: Tensor) -> None:
    model(input_ids=x, labels=x, use_cache=False).loss.backward()


def measure_times(repeats: int) -> pd.DataFrame:
    keep_freed_memory()
    plain, x = gpt2_and_tokens()
    converted = hb.convert(copy.deepcopy(plain), hb.Backprop())

    def step(model: nn.Module, method: hb.Method | None, fresh: bool = False) -> Callable:
        def run() -> float:
            if method is not None:
                hb.set_method(model, method)
            for chain in hb.chains(model) if fresh else ():
                chain.gammas.reset()
            model.zero_grad()
            return benchmark.timed(lambda: forward_and_backward(model, x))

        return run

    def trunk_inputs() -> float:
        h = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE, requires_grad=True)
        out = h
        for block in plain.transformer.h:
            out = block(out)
        return benchmark.timed(lambda: torch.autograd.grad(out, h, torch.ones_like(out)))

    runs = {"plain": step(plain, None), "bp": step(converted, hb.Backprop())}
    runs |= {f"k{k}": step(converted, hb.Highway(k)) for k in (0, 1, 3)}
    runs["k1_estimating"] = step(converted, hb.Highway(1, gamma="auto"), fresh=True)
    runs["trunk_input_backward"] = trunk_inputs
    return benchmark.interleaved(runs, repeats)


def measure_memory() -> dict[str, float]:
    """Hidden states per sublayer that a step needs at its peak above the untouched model's."""
    model, x = gpt2_and_tokens()

    def step() -> None:
        model.zero_grad()
        forward_and_backward(model, x)

    plain, states = benchmark.tensor_peak(step), 2 * LAYERS * 4 * x.numel() * WIDTH
    hb.convert(model, hb.Backprop())
    found = {}
    for name in ("bp", "k0", "k2"):
        hb.set_method(model, benchmark.method_of(name))
        found[name] = (benchmark.tensor_peak(step) - plain) / states
    return found


def main(argv: Sequence[str]) -> None:
    args = benchmark.arguments(__doc__, repeats=9).parse_args(argv)
    seconds = measure_times(args.repeats)
    ratios, memory = benchmark.median_ratios(seconds, RATIOS), measure_memory()
    for name, value in ratios.items():
        print(f"{name:40} {value:.4f}")
    for name, value in memory.items():
        print(f"hidden states per sublayer above plain, {name:2} {value:.2f}")
    record = benchmark.new_record(
        repeats=args.repeats,
        seconds=seconds.median().to_dict(),
        ratios=ratios,
        hidden_states_per_sublayer_above_plain=memory,
    )
    benchmark.save(record, args.out)


if __name__ == "__main__":
    run(main)
