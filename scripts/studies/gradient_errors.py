"""Compare gradient errors on a trained network between variants: gamma, groups and carry.

    python scripts/studies/gradient_errors.py runs/gpt2/RUN --out results/errors_gpt2.json

On some training batches of a finished run, the program compares the gradient of all parameters by
every variant and k with backpropagation's. A recurrent network's variants are its carries, windows
of steps and the fixed point; those of other chains are gammas and groups. A run that was made with
trainer.snapshots=[100,500] has kept its weights after these steps: they are compared as well.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.errors import UserError
from scripts.benchmark import new_record, save
from scripts.evidence.rows import read_run
from scripts.program import at_least_one, run

KS = (0, 1, 2, 3, 5)
GAMMAS = (0.0, 0.2, 0.5, 0.8, "auto")
WINDOW, GROUPS = 16, 4


def load(folder: Path) -> tuple[nn.Module, object, dict, dict[int, dict]]:
    """The model of a finished run, its data, its row, and its weights by step, the last as well."""
    if not (folder / "DONE").exists():
        raise UserError(f"{folder} is no finished run; expected a folder that contains DONE")
    row, _ = read_run(folder)
    cfg = OmegaConf.create(row["config"])
    from_hub = "load_hub" in cfg.data._target_
    root = {"root": os.environ.get("HIGHWAY_BP_DATA")} if from_hub else {}
    data = instantiate(cfg.data, **root)
    model = instantiate(cfg.model, **data.model_arguments())
    files = (folder / "snapshots").glob("*.pt")
    states = [*(torch.load(f, weights_only=True) for f in files), checkpoint.load(folder)]
    weights = {state["step"]: state["model"] for state in states}
    return model, data, row, dict(sorted(weights.items()))


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, hb.GRU | hb.LSTM)]


def variants(model: nn.Module) -> dict[str, tuple[hb.Method, str]]:
    """By name of a variant, its method (at any k) and the carry of recurrent layers."""
    layers = recurrent(model)
    if layers:
        carries = {f"{carry} carry": (hb.Highway(0), carry) for carry in layers[0].cells}
        windows = {f"windows of {WINDOW}": (hb.Highway(0, group_size=WINDOW), "gate")}
        return carries | windows | {"fixed point": (hb.FixedPoint(0), "gate")}
    size = -(-hb.chain_length(model) // GROUPS)
    plain = {f"gamma {g}": (hb.Highway(0, g), "gate") for g in GAMMAS}
    return plain | {f"{GROUPS} groups": (hb.Highway(0, group_size=size), "gate")}


def errors(model: nn.Module, batches: Sequence, task) -> list[dict]:
    """A record per variant and k."""

    def loss(model: nn.Module) -> torch.Tensor:
        return sum(task.loss(model, x, y)[0] for x, y in batches) / len(batches)

    found = []
    for name, (method, carry) in variants(model).items():
        for layer in recurrent(model):
            layer.carry = carry
        for chain in hb.chains(model):
            chain.gammas.reset()  # estimated anew from these batches
        found += [
            {"variant": name, "k": e.k, "cosine": e.cosine, "relative_error": e.relative_error}
            for e in hb.gradient_error(model, loss, KS, method)
        ]
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--batches", type=at_least_one, default=2)
    args = parser.parse_args(argv)
    model, data, row, moments = load(args.run)
    source = data.train_batches(row["batch_size"], seed=1, device="cpu")
    batches = [source.batch(i) for i in range(args.batches)]
    record = []
    for step, weights in moments.items():
        model.load_state_dict(weights)
        found = errors(model, batches, data.task)
        record.append({"step": step, "errors": found})
        cosines = pd.DataFrame(found).pivot(index="variant", columns="k", values="cosine")
        cosines = cosines.reindex(list(variants(model))).to_string(float_format="{:.4f}".format)
        print(f"after {step} steps of {row['grad']}, cosine with the exact gradient\n{cosines}")
    about = {n: row[n] for n in ("experiment", "grad", "k", "seed", "config_hash", "commit")}
    save(new_record(run=about, moments=record), args.out)


if __name__ == "__main__":
    run(main)
