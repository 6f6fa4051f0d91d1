"""Time a whole training step of a preset for many methods, alternating in one process.

    python scripts/bench_steps.py gru_cifar10_pixels --arms bp k0 k1 k3 k10 fp3

Batch, forward, backward, clipping and optimiser, on made-up data of the preset's shape, in the
precision that the preset has on this device. Written to results/steps_PRESET.DEVICE.json, from
which figures take their axes of time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

import highway_bp as hb
from experiments.atomic import write_text
from experiments.config import composed
from experiments.identity import precision_of
from experiments.optimizer import build_optimizer
from experiments.provenance import environment
from experiments.run import prepare_torch
from scripts.program import run
from scripts.surrogate import surrogate
from scripts.timing import DEVICE, interleaved, medians, timed

ARMS = ["bp", "k0", "k1", "k2", "k3", "k5", "k10"]


def method_of(arm: str, gamma: float) -> hb.Method:
    """ "bp", "k3" (Highway-BP at the preset's gamma), "k3g0.2", "fp3"."""
    if arm == "bp":
        return hb.Backprop()
    kind, k, other = re.fullmatch(r"(k|fp)(\d+)(?:g([\d.]+))?", arm).groups()
    share = gamma if other is None else float(other)
    return hb.FixedPoint(int(k)) if kind == "fp" else hb.Highway(int(k), share)


def step_of(cfg: DictConfig, arm: str) -> Callable[[], None]:
    """One training step on the same batch at every call."""
    data = surrogate(cfg.data)
    torch.manual_seed(0)
    pretrained = {"pretrained": None} if cfg.model.get("pretrained") else {}
    model = instantiate(cfg.model, **data.model_arguments(), **pretrained).to(DEVICE).train()
    hb.set_method(model, method_of(arm, cfg.gamma))
    amp = precision_of(cfg.trainer, DEVICE.type) == "bfloat16"
    images = {"memory_format": torch.channels_last}
    if not (amp and DEVICE.type == "cpu"):
        model.to(**images)
    optimizer = build_optimizer(model, cfg.optim)
    x, y = data.train_batches(cfg.optim.batch_size, 0, DEVICE).batch(0)
    if x.dim() == 4 and not (amp and DEVICE.type == "cpu"):
        x = x.contiguous(**images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=amp):
            loss, _ = data.task.loss(model, x, y)
        loss.backward()
        norm = hb.total_norm(model)
        if cfg.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.optim.clip, norm)
        optimizer.step()

    return step


def measure(preset: str, arms: Sequence[str], repeats: int, overrides: Sequence[str]) -> dict:
    cfg = composed(f"experiment={preset}", *overrides)
    prepare_torch(cfg.trainer)
    steps = {arm: step_of(cfg, arm) for arm in arms}
    seconds = interleaved({arm: lambda s=s: timed(s) for arm, s in steps.items()}, repeats)
    return {
        "preset": preset,
        "overrides": list(overrides),
        "precision": precision_of(cfg.trainer, DEVICE.type),
        "repeats": repeats,
        "seconds": medians(seconds),
        "spread": {arm: [min(values), max(values)] for arm, values in seconds.items()},
        "environment": environment(DEVICE),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="of configs/experiment")
    parser.add_argument("overrides", nargs="*", help="arguments of train.py")
    parser.add_argument("--arms", nargs="+", default=ARMS, help=", ".join(ARMS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder")
    args = parser.parse_intermixed_args(argv)
    record = measure(args.preset, args.arms, args.repeats, args.overrides)
    file = args.out / f"steps_{args.preset}.{DEVICE.type}.json"
    write_text(file, json.dumps(record, indent=1) + "\n")
    print(file, {arm: round(1000 * s, 2) for arm, s in record["seconds"].items()}, "ms")


if __name__ == "__main__":
    run(main)
