"""Ask hb.advise about the networks of finished runs, on this machine.

    python scripts/advise_runs.py runs/RUN ... --out results/tables/advice.md

On a training batch of the run's own size, with the weights as they are at its end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import highway_bp as hb
from experiments.provenance import environment
from scripts.evidence.results_io import run
from scripts.trained import load


def advice(folder: Path, root: str | None) -> str:
    """A heading that says what was trained, and the advice as it is printed."""
    model, data, row = load(folder, root)
    batch = data.train_batches(row["batch_size"], seed=1, device="cpu").batch(0)
    found = hb.advise(model.train(), batch, lambda m, b: data.task.loss(m, *b)[0])
    return (
        f"## {row['model']} after {row['steps']} steps of {row['grad']}, batch "
        f"{row['batch_size']}, {row['data']}\n\n```\n{found}\n```\n"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument(
        "--root",
        default=os.environ.get("HIGHWAY_BP_DATA"),
        help="folder of the data sets, see data.root",
    )
    args = parser.parse_args(argv)
    made = environment(torch.device("cpu"))
    state = "with uncommitted changes" if made["dirty"] else "clean"
    pages = [
        f"# What hb.advise says of trained networks\n\nOn {made['device']}, torch "
        f"{made['torch']}, commit {made['commit'][:10]} ({state}).\n"
    ]
    for folder in args.runs:
        pages.append(advice(folder, args.root))
        print(pages[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(pages))


if __name__ == "__main__":
    run(main)
