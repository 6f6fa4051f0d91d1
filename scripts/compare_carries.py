"""How fast each carry's gradient converges on trained networks: cosine and relative error per k.

    python scripts/compare_carries.py runs/gru/RUN runs/lstm/RUN --out results/carries.json

Every RUN is a finished run of a recurrent network. The gradient of all parameters over some
training batches, by Highway-BP with each carry, by the fixed point and with windows of steps, is
compared with backpropagation's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import highway_bp as hb
from experiments.errors import UserError
from experiments.provenance import environment
from scripts.trained import error_table, load, of_a_run

KS = (0, 1, 2, 3, 5, 10, 20)
WINDOW = 16


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, hb.GRU | hb.LSTM)]


def gradient(model: nn.Module, method: hb.Method, carry: str, batches: Sequence, task) -> Tensor:
    """Of all parameters side by side, the mean over the batches."""
    hb.set_method(model, method)
    for layer in layers(model):
        layer.carry = carry
    model.zero_grad()
    for x, y in batches:
        (task.loss(model, x, y)[0] / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def errors(model: nn.Module, batches: Sequence, task) -> list[dict]:
    exact = gradient(model, hb.Backprop(), "gate", batches, task)
    carries = layers(model)[0].cells
    cases = [(f"Highway, {carry} carry", carry, hb.Highway) for carry in carries]
    cases += [
        (f"Highway, windows of {WINDOW}", "gate", lambda k: hb.Highway(k, group_size=WINDOW)),
        ("fixed point", "gate", hb.FixedPoint),
    ]
    rows = []
    warnings.filterwarnings("ignore", message=r"k=\d+ is larger than L=")  # of windows
    for name, carry, method in cases:
        for k in KS:
            found = gradient(model, method(k), carry, batches, task)
            rows.append(
                {
                    "case": name,
                    "k": k,
                    "cosine": torch.cosine_similarity(found, exact, dim=0).item(),
                    "relative_error": ((found - exact).norm() / exact.norm()).item(),
                }
            )
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="write the record here, and its tables as .md")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument(
        "--root",
        default=os.environ.get("HIGHWAY_BP_DATA"),
        help="folder of the data sets, see data.root",
    )
    args = parser.parse_args(argv)
    record: dict = {"environment": environment(torch.device("cpu")), "runs": []}
    pages = []
    for folder in args.runs:
        model, data, row = load(folder, args.root)
        source = data.train_batches(row["batch_size"], seed=1, device="cpu")
        rows = errors(model, [source.batch(i) for i in range(args.batches)], data.task)
        record["runs"].append({"trained": of_a_run(row), "errors": rows})
        title = (
            f"{row['model']} trained {row['steps']} steps by {row['grad']} on {row['data']} "
            f"({row['metric'].removeprefix('eval_')} {row[row['metric']]:.3f})"
        )
        pages.append(
            f"## {title}\n\n{error_table(rows, 'cosine')}\n\n"
            f"{error_table(rows, 'relative_error')}\n"
        )
        print(pages[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        page = "# How fast each carry's gradient converges\n\n" + "\n".join(pages)
        args.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
