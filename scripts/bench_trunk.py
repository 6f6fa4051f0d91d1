"""Measure what `hb.convert` costs on a GPT-2 of transformers, beside the model as it was.

    python scripts/bench_trunk.py --out results/bench_trunk.json

The paper's GPT-2 (12 layers of width 256, 256 tokens), batch 4. Times are medians of interleaved
repetitions in one process, after a warm-up, synchronised on CUDA; a ratio is the median of the
ratios inside each repetition.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import highway_bp as hb
from experiments.malloc import keep_freed_memory
from experiments.provenance import environment
from models.pretrained import quiet_transformers
from scripts.timing import DEVICE, Seconds, interleaved, medians, tensor_peak, timed

VOCABULARY, BATCH, LENGTH, EVERY = 4096, 4, 256, hb.AutoGamma().every


def gpt2() -> nn.Module:
    transformers = quiet_transformers()
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=256,
            n_layer=12,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def measure(repeats: int) -> Seconds:
    torch.manual_seed(0)
    keep_freed_memory()
    plain = gpt2().to(DEVICE).train()
    converted = hb.convert(copy.deepcopy(plain), hb.Backprop())
    x = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)

    def step(model: nn.Module, method: hb.Method | None, fresh: bool = False) -> Callable:
        def run() -> float:
            if method is not None:
                hb.set_method(model, method)
            for chain in hb.chains(model) if fresh else ():
                chain.gammas.reset()
            model.zero_grad()
            return timed(lambda: model(input_ids=x, labels=x, use_cache=False).loss.backward())

        return run

    def trunk_inputs() -> float:
        h = torch.randn(BATCH, LENGTH, 256, device=DEVICE, requires_grad=True)
        out = h
        for block in plain.transformer.h:
            out = block(out)
        return timed(lambda: torch.autograd.grad(out, h, torch.ones_like(out)))

    runs = {"plain": step(plain, None), "bp": step(converted, hb.Backprop())}
    runs |= {f"k{k}": step(converted, hb.Highway(k)) for k in (0, 1, 3)}
    runs["k1_estimating"] = step(converted, hb.Highway(1, gamma="auto"), fresh=True)
    runs["trunk_input_backward"] = trunk_inputs
    return interleaved(runs, repeats)


def measure_memory() -> dict[str, float]:
    """Hidden states per sublayer that a step needs at its peak above the untouched model's."""
    torch.manual_seed(0)
    model = gpt2().to(DEVICE).train()
    x = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)

    def step() -> None:
        model.zero_grad()
        model(input_ids=x, labels=x, use_cache=False).loss.backward()

    plain, state = tensor_peak(step), 4 * x.numel() * 256
    hb.convert(model, hb.Backprop())
    found = {}
    for name, method in {"bp": hb.Backprop(), "k0": hb.Highway(0), "k2": hb.Highway(2)}.items():
        hb.set_method(model, method)
        found[name] = (tensor_peak(step) - plain) / (24 * state)
    return found


RATIOS: dict[str, Callable[[dict[str, float]], float]] = {
    "converted_bp_over_plain": lambda t: t["bp"] / t["plain"],
    "k0_over_plain": lambda t: t["k0"] / t["plain"],
    "k1_over_plain": lambda t: t["k1"] / t["plain"],
    "k3_over_plain": lambda t: t["k3"] / t["plain"],
    "iteration_over_trunk_input_backward": lambda t: (
        (t["k3"] - t["k0"]) / 3 / t["trunk_input_backward"]
    ),
    "share_of_auto_gamma": lambda t: (t["k1_estimating"] - t["k1"]) / EVERY / t["k1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    seconds = measure(args.repeats)
    rounds = [
        dict(zip(seconds, column, strict=True)) for column in zip(*seconds.values(), strict=True)
    ]
    ratios = {name: statistics.median(map(ratio, rounds)) for name, ratio in RATIOS.items()}
    record = {
        "environment": environment(DEVICE),
        "repeats": args.repeats,
        "seconds": medians(seconds),
        "ratios": ratios,
        "hidden_states_per_sublayer_above_plain": measure_memory(),
    }
    for name, value in ratios.items():
        print(f"{name:40} {value:.4f}")
    for name, value in record["hidden_states_per_sublayer_above_plain"].items():
        print(f"hidden states per sublayer above plain, {name:2} {value:.2f}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
