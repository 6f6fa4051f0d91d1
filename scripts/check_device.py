"""Train every kind of model by every kind of method for three steps on the GPU and on the CPU.

    python scripts/check_device.py --out checks.json

Both begin with the same weights and batches, the CPU in float32. Said for every combination: how
far loss and gradient norm of any step are from the CPU's, relative to it. Exit code 1 if one is
further away than float32 (or bfloat16) explains. On a machine without a GPU the CPU is compared
with itself, which tries the program alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from hydra.utils import instantiate
from torch import nn

import highway_bp as hb
from experiments.atomic import write_text
from experiments.config import composed
from experiments.errors import UserError
from experiments.provenance import environment
from experiments.run import prepare_torch
from scripts.benchmark import DEVICE
from scripts.program import run
from scripts.surrogate import surrogate

STEPS, BATCH = 3, 8
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}
# Models in small, as arguments of train.py.
MODELS = {
    "resnet20_preact": ["model=resnet20_preact"],
    "resnet20": ["model=resnet20"],
    "resnet20 strided": ["model=resnet20", "model.downsampling=strided"],
    "resnet20 irevnet": ["model=resnet20_preact", "model.downsampling=irevnet"],
    "torchvision resnet18": ["model=resnet50", "model.name=resnet18", "data=cifar10"],
    "vit": ["model=vit", "model.layers=3"],
    "gpt2": ["model=gpt2_small", "model.layers=3", "data.length=32"],
    "llama": ["model=llama", "model.layers=3", "data.length=32", "data.vocabulary=512"],
    "roberta": ["experiment=grammar", "data.length=16"],
    "gru_char": ["model=gru_char", "model.hidden=64", "data.length=48"],
    "gru_char diagonal": [
        "model=gru_char",
        "model.hidden=64",
        "data.length=48",
        "model.carry=diagonal",
    ],
    "lstm_char": ["model=lstm_char", "model.hidden=64", "data.length=48"],
    "lstm_char literal": [
        "model=lstm_char",
        "model.hidden=64",
        "data.length=48",
        "model.carry=literal",
    ],
    "gru_words": ["model=gru_words", "model.hidden=64", "data.length=48", "data.vocabulary=512"],
    "gru_pixels": ["model=gru_pixels", "model.hidden=32"],
}
METHODS = {
    "bp": hb.Backprop(),
    "k0": hb.Highway(0),
    "k3": hb.Highway(3),
    "k2 gamma 0.2": hb.Highway(2, 0.2),
    "k1 groups": hb.Highway(1, group_size=4),
    "fp2": hb.FixedPoint(2),
    "bptt": hb.TruncatedBPTT(4),
    "mgrit": hb.MGRIT(1, 3),
    "k2 auto": hb.Highway(2, "auto"),
    "k9 tolerance": hb.Highway(9, tolerance=0.3),
}


def losses(
    model: nn.Module, data, method: hb.Method, device: torch.device, amp: bool
) -> torch.Tensor:
    """Loss and gradient norm of each step (STEPS, 2), float64 on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    hb.set_method(model, method)
    batches = data.train_batches(BATCH, 0, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(STEPS):
        x, y = batches.batch(step)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            loss, _ = data.task.loss(model, x, y)
        loss.backward()
        norm = hb.total_norm(model)
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        optimizer.step()
        found.append(torch.stack([loss.detach(), norm]))
    return torch.stack(found).double().cpu()


def compared(model_name: str, method_name: str) -> dict[str, dict]:
    """By precision the largest error, or why the model refuses the method."""
    cfg = composed(*MODELS[model_name])
    data = surrogate(cfg.data, rows=64)
    torch.manual_seed(0)
    model = instantiate(cfg.model, **data.model_arguments())
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # devices draw other random numbers
            module.p = 0.0
    method = METHODS[method_name]
    try:
        exact = losses(model, data, method, torch.device("cpu"), amp=False)
    except ValueError as error:
        return {precision: {"refused": str(error)} for precision in ALLOWED}
    found = {}
    for precision in ALLOWED:
        there = losses(model, data, method, DEVICE, amp=precision == "bfloat16")
        found[precision] = {"error": ((there - exact).abs() / exact.abs()).max().item()}
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the errors here (JSON)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(argv)
    prepare_torch(composed("trainer.threads=4").trainer)
    table: dict[str, dict] = {}
    for model in args.models:
        start = time.perf_counter()
        for method in args.methods:
            try:
                found = compared(model, method)
            except Exception as error:  # the others are to be tried as well
                traceback.print_exc()
                found = {p: {"failed": f"{type(error).__name__}: {error}"} for p in ALLOWED}
            table |= {f"{model}, {method}, {p}": result for p, result in found.items()}
        worst = [
            max((r.get("error", 0.0) for n, r in table.items() if _is_of(n, model, p)))
            for p in ALLOWED
        ]
        said = ", ".join(f"{w:.1e} {p}" for w, p in zip(worst, ALLOWED, strict=True))
        print(f"{model}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
    failed = [name for name, result in table.items() if _is_off(name, result)]
    if args.out:
        record = {"environment": environment(DEVICE), "allowed": ALLOWED, "found": table}
        write_text(args.out, json.dumps(record, indent=1) + "\n")
    if failed:
        raise UserError(f"{len(failed)} of {len(table)} are off: {'; '.join(failed)}")
    print(f"all {len(table)} agree, on {environment(DEVICE)['device']}")


def _is_of(name: str, model: str, precision: str) -> bool:
    return name.startswith(f"{model},") and name.endswith(precision)


def _is_off(name: str, result: dict) -> bool:
    return "failed" in result or result.get("error", 0.0) > ALLOWED[name.rpartition(", ")[2]]


if __name__ == "__main__":
    run(main)
