"""Trained networks from run folders, and tables of what was measured on them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from experiments import checkpoint
from experiments.errors import UserError

OF_A_RUN = ("model", "grad", "k", "data", "steps", "seed", "config_hash", "commit", "metric")


def load(folder: Path, root: str | None) -> tuple[nn.Module, Any, dict]:
    """The trained model of a finished run, its data, and the run's row.

    Raises UserError for a folder without a finished run.
    """
    if not (folder / "DONE").exists():
        raise UserError(f"{folder} is no finished run; expected a folder that contains DONE")
    row = json.loads((folder / "row.json").read_text())
    cfg = OmegaConf.create(row["config"])
    from_hub = "load_hub" in cfg.data._target_
    data = instantiate(cfg.data, **({"root": root} if from_hub else {}))
    model = instantiate(cfg.model, **data.model_arguments())
    state, _ = checkpoint.load(folder)
    model.load_state_dict(state["model"])
    return model, data, row


def load_snapshot(model: nn.Module, file: Path) -> int:
    """Put a snapshot's weights into the model; returns its step.

    Raises UserError for a file that is none, or of another model.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: no snapshot of this model ({str(error)[:100]})") from error
    return state["step"]


def of_a_run(row: dict) -> dict:
    """What is said of the run a network comes from, beside what is measured on it."""
    return {key: row[key] for key in OF_A_RUN} | {row["metric"]: row[row["metric"]]}


def error_table(rows: Sequence[dict], score: str) -> str:
    """Markdown: a line per case, a column per k; rows have case, k and the score."""
    ks = sorted({row["k"] for row in rows})
    lines = [
        f"| {score.replace('_', ' ')} | " + " | ".join(f"k = {k}" for k in ks) + " |",
        "|---" * (len(ks) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        values = [f"{row[score]:.4f}" for row in rows if row["case"] == case]
        lines.append(f"| {case} | " + " | ".join(values) + " |")
    return "\n".join(lines)
