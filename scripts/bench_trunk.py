"""Measure what `hb.convert` costs on models of transformers, beside the unconverted models.

    python scripts/bench_trunk.py --out results/bench_trunk.json

The models are the paper's GPT-2 (12 layers of width 256, 256 tokens, batch 4) and a mixture of
experts (Mixtral, 4 layers of width 256, 4 experts), without and with its router loss: its gradient
comes from inside the layers. Times are of forward and backward pass. scripts/benchmark.py explains
how times and memory are measured.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.devices import keep_freed_memory
from models.pretrained import quiet_transformers
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run

VOCABULARY, BATCH, LENGTH, WIDTH, LAYERS = 16_000, 4, 256, 256, 12
EVERY = hb.AutoGamma().every
RATIOS = {
    "converted_bp_over_plain": "bp / plain",
    "k0_over_plain": "k0 / plain",
    "k1_over_plain": "k1 / plain",
    "k3_over_plain": "k3 / plain",
    "iteration_over_trunk_input_backward": "(k3 - k0) / 3 / trunk_input_backward",
    "share_of_auto_gamma": f"(k1_estimating - k1) / {EVERY} / k1",
    "experts_k0_over_plain": "experts_k0 / experts_plain",
    "experts_k0_with_router_loss_over_plain": "experts_k0_router / experts_plain_router",
}


def gpt2() -> nn.Module:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    return causal_model("gpt2", **sizes, **no_dropout)


def experts() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    return causal_model("mixtral", **sizes, **heads)


def causal_model(family: str, **sizes: float) -> nn.Module:
    torch.manual_seed(0)
    transformers = quiet_transformers()
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **sizes
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(DEVICE).train()


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)


def forward_and_backward(model: nn.Module, x: Tensor, **asked: bool) -> None:
    model(input_ids=x, labels=x, use_cache=False, **asked).loss.backward()


def step(
    model: nn.Module, x: Tensor, name: str | None, fresh: bool = False, **asked: bool
) -> Callable[[], float]:
    """A timed step with method ``name`` (None: unconverted model); fresh: estimate gamma anew."""
    method = name and benchmark.method_of(name, gamma="auto" if fresh else 0.0)

    def timed() -> float:
        if method:
            hb.set_method(model, method)
        for chain in hb.chains(model) if fresh else ():
            chain.gammas.reset()
        model.zero_grad()
        return benchmark.timed(lambda: forward_and_backward(model, x, **asked))

    return timed


def measure_times(repeats: int) -> dict[str, dict]:
    keep_freed_memory()
    x, plain = tokens(), gpt2()
    converted = hb.convert(copy.deepcopy(plain), hb.Backprop())

    def trunk_inputs() -> float:
        h = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE, requires_grad=True)
        out = h
        for block in plain.transformer.h:
            out = block(out)
        return benchmark.timed(lambda: torch.autograd.grad(out, h, torch.ones_like(out)))

    runs = {"plain": step(plain, x, None)}
    runs |= {name: step(converted, x, name) for name in ("bp", "k0", "k1", "k3")}
    runs["k1_estimating"] = step(converted, x, "k1", fresh=True)
    runs["trunk_input_backward"] = trunk_inputs
    plain_experts = experts()
    converted_experts = hb.convert(copy.deepcopy(plain_experts), hb.Backprop())
    for suffix, asked in (("", {}), ("_router", {"output_router_logits": True})):
        runs[f"experts_plain{suffix}"] = step(plain_experts, x, None, **asked)
        runs[f"experts_k0{suffix}"] = step(converted_experts, x, "k0", **asked)
    return benchmark.times(runs, repeats, RATIOS)


def peak_of(name: str | None) -> int:
    """Peak bytes of a step with the method ``name`` (None: of the unconverted model)."""
    model, x = gpt2(), tokens()
    if name:
        hb.convert(model, benchmark.method_of(name))

    def run_step() -> None:
        model.zero_grad()
        forward_and_backward(model, x)

    return benchmark.tensor_peak(run_step)


def measure_memory() -> dict[str, float]:
    """Peak memory of a step above the unconverted model's, in hidden states per layer."""
    names, states = ("bp", "k0", "k2"), LAYERS * 4 * BATCH * LENGTH * WIDTH
    plain, *peaks = (benchmark.in_a_fresh_process(peak_of, name) for name in (None, *names))
    return {name: (peak - plain) / states for name, peak in zip(names, peaks, strict=True)}


def main(argv: Sequence[str]) -> None:
    args = benchmark.arguments(__doc__, repeats=9).parse_args(argv)
    times, memory = measure_times(args.repeats), measure_memory()
    benchmark.show("times", times["ratios"])
    benchmark.show("hidden states per layer above the unconverted model", memory)
    record = benchmark.new_record(repeats=args.repeats, **times)
    benchmark.save(record | {"hidden_states_per_layer_above_plain": memory}, args.out)


if __name__ == "__main__":
    run(main)
