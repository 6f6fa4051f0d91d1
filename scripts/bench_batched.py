"""Measure one iteration's block products done one by one, and batched through one call.

    python scripts/bench_batched.py --out results/bench_batched.json

Twelve sublayers of equal shape: w_i J_i by twelve backward passes, or by one through a vmap over
the stacked parameters. Both give the same numbers, which is checked. Medians of interleaved
repetitions in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from experiments.provenance import environment
from scripts.timing import DEVICE, Seconds, interleaved, medians, timed
from scripts.transformer_layers import Attention, FeedForward

SUBLAYERS = 12
SHAPES = ((4, 256, 256, 4), (1, 128, 128, 4), (1, 32, 64, 2), (1, 8, 32, 2))  # B, T, D, heads


def measure(kind: str, B: int, T: int, D: int, heads: int, repeats: int) -> Seconds:
    """Seconds of w_i J_i for all sublayers, "one_by_one" and "batched"."""
    torch.manual_seed(0)
    layers = [
        Attention(D, heads) if kind == "attention" else FeedForward(D) for _ in range(SUBLAYERS)
    ]
    layers = [layer.to(DEVICE) for layer in layers]
    h, w = torch.randn(2, SUBLAYERS, B, T, D, device=DEVICE)
    inputs = [x.clone().requires_grad_() for x in h]
    outputs = [layer.block(x) for layer, x in zip(layers, inputs, strict=True)]
    stacked, out = _batched_blocks(layers, h)

    def one_by_one() -> list[Tensor]:
        return [
            torch.autograd.grad(o, x, w_i, retain_graph=True)[0]
            for o, x, w_i in zip(outputs, inputs, w, strict=True)
        ]

    def batched() -> Tensor:
        return torch.autograd.grad(out, stacked, w, retain_graph=True)[0]

    torch.testing.assert_close(batched(), torch.stack(one_by_one()), rtol=1e-4, atol=1e-5)
    return interleaved(
        {"one_by_one": lambda: timed(one_by_one), "batched": lambda: timed(batched)}, repeats
    )


def _batched_blocks(layers: list[nn.Module], h: Tensor) -> tuple[Tensor, Tensor]:
    """States (n, B, T, D) as a leaf, and the blocks of all layers on them in one call."""
    parameters, _ = stack_module_state(layers)
    bare = copy.deepcopy(layers[0]).to("meta")
    leaf = h.clone().requires_grad_()
    blocks = vmap(lambda p, x: functional_call(bare, p, (x,)) - x)  # f(h) = h + block(h)
    return leaf, blocks(parameters, leaf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    cases = []
    for kind in ("attention", "feed-forward"):
        for B, T, D, heads in SHAPES:
            seconds = measure(kind, B, T, D, heads, args.repeats)
            ratio = statistics.median(
                a / b for a, b in zip(seconds["one_by_one"], seconds["batched"], strict=True)
            )
            cases.append(
                {
                    "kind": kind,
                    "batch": B,
                    "length": T,
                    "width": D,
                    "seconds": medians(seconds),
                    "one_by_one_over_batched": ratio,
                }
            )
            print(
                f"{kind:12} batch {B}, length {T:3}, width {D:3}: one by one / batched {ratio:.2f}"
            )
    if args.out:
        record = {"environment": environment(DEVICE), "sublayers": SUBLAYERS, "cases": cases}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
