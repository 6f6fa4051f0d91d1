"""Bounds and estimates of Highway-BP's error beside the error itself (docs/theory.md).

    python scripts/compare_bound.py --out /tmp/bound/bound.json
    python scripts/compare_bound.py runs/RUN ... --out /tmp/bound/runs.json

RUN is a finished run of a ResNet, a transformer or a GRU. Without one, a small network of each
kind is trained for some steps on data that needs no download. Beside the record go its tables (.md)
and a figure (.png). A GRU's steps are run as the layers of a chain.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import highway_bp as hb
from experiments.data.digits import load_digits
from experiments.data.topics import load_topics
from experiments.errors import UserError
from experiments.provenance import environment
from highway_bp.diagnostics.error_bound import error_bound
from models.decoder import Decoder
from models.resnet import ResNet
from models.rnn import RNNLanguageModel
from scripts import trained
from scripts.figures.style import plt, save

KS = range(9)
HIGHEST = 1e6  # of a figure
LINES = {
    "bound": ("bound", "#D55E00", "--"),
    "residual_bound": ("bound from the residual", "#E69F00", "--"),
    "probe_estimate": ("estimate from probes", "#009E73", ":"),
    "residual_estimate": ("estimate from the residual", "#0072B2", ":"),
    "increment_estimate": ("estimate from increments", "#CC79A7", ":"),
    "measured": ("measured", "black", "-"),
}
TEXT = partial(load_topics, "characters", 100, 64)


@dataclass(frozen=True)
class Small:
    """A network that is trained here, by backpropagation and Adam."""

    data: Callable[[], Any]
    model: Callable[..., nn.Module]
    lr: float
    batch: int = 16


SMALL = {
    "ResNet-20 on digits": Small(load_digits, partial(ResNet, 20, preact=False), 1e-3, 32),
    "GPT, 4 layers, on topics": Small(
        TEXT, partial(Decoder, layers=4, hidden=64, heads=4, length=64), 2e-3
    ),
    "GRU over 64 steps, on topics": Small(
        TEXT, partial(RNNLanguageModel, cell="gru", hidden=64), 3e-3
    ),
}


def train(small: Small, steps: int) -> tuple[nn.Module, Any, float]:
    """The trained model, its data, and its last training loss."""
    torch.manual_seed(0)
    data = small.data()
    model = small.model(**data.model_arguments())
    optimizer = torch.optim.Adam(model.parameters(), small.lr)
    source = data.train_batches(small.batch, seed=0, device="cpu")
    for step in range(steps):
        optimizer.zero_grad()
        loss = data.task.loss(model, *source.batch(step))[0]
        loss.backward()
        optimizer.step()
    return model, data, loss.item()


class GRUStep(nn.Module):
    """h_t = (1 - z) n + z h_{t-1}; the carry is diag(z), the update gate."""

    def __init__(self, t: int):
        super().__init__()
        self.t = t

    def with_carry(self, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None):
        """h (B, H); x (L, B, 3H), the inputs' share of the gates."""
        x_r, x_z, x_n = x[self.t].chunk(3, -1)
        h_r, h_z, h_n = F.linear(h, weight, bias).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (1 - z) * n + z * h, z.detach()

    def forward(self, h: Tensor, *arguments) -> Tensor:
        return self.with_carry(h, *arguments)[0]


class GRUSteps(nn.Module):
    """A GRU of one layer and direction whose steps are the layers of a chain."""

    def __init__(self, gru: hb.GRU):
        super().__init__()
        if gru.num_layers > 1 or gru.bidirectional or gru.batch_first:
            raise UserError(f"{gru}: expected one layer, one direction, time first")
        self.hidden, self.chain = gru.hidden_size, hb.ResidualChain([])
        for name, weight in gru.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (L, B, I) to outputs (L, B, H) and the last state (1, B, H)."""
        if len(self.chain) != len(x):
            self.chain = hb.ResidualChain(map(GRUStep, range(len(x))), self.chain.method)
        by_input = F.linear(x, self.weight_ih, getattr(self, "bias_ih", None))
        h = self.chain(
            x.new_zeros(x.shape[1], self.hidden),
            by_input,
            self.weight_hh,
            getattr(self, "bias_hh", None),
            return_states=True,
        )
        return torch.stack(h), h[-1][None]


def unroll(module: nn.Module) -> None:
    """Put `GRUSteps` in the place of every GRU inside."""
    for name, child in module.named_children():
        if isinstance(child, hb.GRU):
            setattr(module, name, GRUSteps(child))
        else:
            unroll(child)


def errors(model: nn.Module, data: Any, samples: int) -> list[dict]:
    """A row per k of `error_bound` on one training batch; null stands for no finite value."""
    unroll(model)
    x, y = data.train_batches(samples, seed=1, device="cpu").batch(0)
    found = error_bound(model, lambda model: data.task.loss(model, x, y)[0], KS)
    return [
        {key: value if math.isfinite(value) else None for key, value in asdict(e).items()}
        for e in found
    ]


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line per k, a column per bound or estimate."""
    lines = [
        "| k | " + " | ".join(title for title, *_ in LINES.values()) + " |",
        "|---" * (len(LINES) + 1) + "|",
    ]
    for row in rows:
        values = ["-" if row[name] is None else f"{row[name]:.3g}" for name in LINES]
        lines.append(f"| {row['k']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def figure(networks: Sequence[dict], path: Path) -> None:
    """A panel per network: relative error against k, logarithmic, zeros left out.

    Bounds above `HIGHEST` leave the picture; the panel then names the smallest of them.
    """
    drawn, panels = plt.subplots(
        1, len(networks), figsize=(4.4 * len(networks), 4.2), layout="constrained", squeeze=False
    )
    for axes, network in zip(panels[0], networks, strict=True):
        for name, (label, colour, style) in LINES.items():
            points = [
                (row["k"], row[name]) for row in network["errors"] if row[name] and row[name] > 1e-9
            ]  # below it is rounding
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                style,
                color=colour,
                marker="o",
                ms=3,
                lw=2 if name == "measured" else 1.4,
                label=label,
            )
        axes.axhline(1.0, color="0.8", lw=0.8, zorder=0)
        axes.set_yscale("log")
        bounds = [row["residual_bound"] for row in network["errors"]]
        if max(row["bound"] or 0.0 for row in network["errors"]) > HIGHEST:
            axes.set_ylim(top=HIGHEST)
        if min(filter(None, bounds), default=0.0) > HIGHEST:
            axes.text(
                0.5,
                0.97,
                f"bounds above {min(bounds):.0e}",
                ha="center",
                va="top",
                transform=axes.transAxes,
                fontsize=8,
                color=LINES["bound"][1],
            )
        axes.set_title(textwrap.fill(network["name"], 38), fontsize=8)
        axes.set_xlabel("iterations k")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("error of the states' gradients, relative")
    panels[0][-1].legend(frameon=False, fontsize=8)
    save(drawn, path)


def networks(args: argparse.Namespace):
    """Name, model, data and what is said of the training, one network after another."""
    for folder in args.runs:
        model, data, row = trained.load(folder, args.root)
        name = f"{row['model']} trained {row['steps']} steps by {row['grad']} on {row['data']}"
        yield name, model, data, trained.of_a_run(row)
    for name, small in SMALL.items() if not args.runs else ():
        model, data, loss = train(small, args.steps)
        yield (
            f"{name}, {args.steps} training steps",
            model,
            data,
            {"steps": args.steps, "train_loss": loss},
        )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="the record; its tables and figure lie beside it")
    parser.add_argument("--steps", type=int, default=100, help="training steps without a run")
    parser.add_argument("--samples", type=int, default=8, help="of the batch that is looked at")
    parser.add_argument(
        "--root",
        default=os.environ.get("HIGHWAY_BP_DATA"),
        help="folder of the data sets, see data.root",
    )
    args = parser.parse_args(argv)
    for name in ("steps", "samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}; expected a whole number, at least 1")
    record: dict = {"environment": environment(torch.device("cpu")), "networks": []}
    pages = ["# Bounds and estimates of the error, relative to the exact gradients of the states\n"]
    for name, model, data, training in networks(args):
        rows = errors(model, data, args.samples)
        record["networks"].append(
            {"name": name, "trained": training, "samples": args.samples, "errors": rows}
        )
        pages.append(f"## {name}\n\n{table(rows)}\n")
        print(pages[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(pages))
        figure(record["networks"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
