"""Which share of the carry belongs in the block: gradient errors per gamma, k and moment.

    python scripts/compare_gammas.py runs/RUN --snapshots runs/RUN/snapshots/*.pt \\
        --out results/gammas.json

RUN is a finished run of a transformer (trainer.snapshots=[100,500] keeps its weights at those
steps). At every moment the gradient of all parameters, over some training batches, by
Highway-BP with each gamma, layer by layer and in groups, is compared with backpropagation's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import highway_bp as hb
from experiments.errors import UserError
from experiments.provenance import environment
from scripts.trained import error_table, load, load_snapshot, of_a_run

KS = (0, 1, 2, 3, 5)
GAMMAS = (0.0, 0.2, 0.5, 0.8, "auto")
GROUPS = 4  # as on so many devices


def errors(model: torch.nn.Module, batches: Sequence, task) -> list[dict]:
    L = max(map(len, hb.chains(model)))

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return sum(task.loss(model, x, y)[0] for x, y in batches) / len(batches)

    rows = []
    for size in sorted({1, -(-L // GROUPS)}):
        for gamma in GAMMAS:
            for chain in hb.chains(model):
                chain.gammas.reset()  # estimated anew from these batches
            name = f"gamma {gamma}" + (f", {-(-L // size)} groups" if size > 1 else "")
            for e in hb.gradient_error(model, loss, KS, hb.Highway(0, gamma, size)):
                rows.append(
                    {
                        "case": name,
                        "gamma": gamma,
                        "group_size": size,
                        "k": e.k,
                        "cosine": e.cosine,
                        "relative_error": e.relative_error,
                    }
                )
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--snapshots", type=Path, nargs="*", default=[], help="earlier weights")
    parser.add_argument("--out", type=Path, help="write the record here, and its tables as .md")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument(
        "--root",
        default=os.environ.get("HIGHWAY_BP_DATA"),
        help="folder of the data sets, see data.root",
    )
    args = parser.parse_args(argv)
    model, data, row = load(args.run, args.root)
    last = {name: t.clone() for name, t in model.state_dict().items()}
    source = data.train_batches(row["batch_size"], seed=1, device="cpu")
    batches = [source.batch(i) for i in range(args.batches)]
    moments = [(load_snapshot(model, file), file) for file in args.snapshots]
    record = {
        "environment": environment(torch.device("cpu")),
        "trained": of_a_run(row),
        "moments": [],
    }
    title = (
        f"{row['model']} trained by {row['grad']} on {row['data']}, {row['steps']} steps "
        f"({row['metric'].removeprefix('eval_')} {row[row['metric']]:.3f} at the end)"
    )
    pages = [f"# Gradient errors by gamma: {title}\n"]
    for step, file in [*sorted(moments), (row["steps"], None)]:
        if file is None:
            model.load_state_dict(last)
        else:
            load_snapshot(model, file)
        rows = errors(model, batches, data.task)
        with torch.no_grad():
            loss = sum(data.task.loss(model, x, y)[0].item() for x, y in batches) / len(batches)
        record["moments"].append({"step": step, "train_loss": loss, "errors": rows})
        pages.append(
            f"## After {step} steps, training loss {loss:.3f}\n\n"
            f"{error_table(rows, 'cosine')}\n\n{error_table(rows, 'relative_error')}\n"
        )
        print(pages[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(pages))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
