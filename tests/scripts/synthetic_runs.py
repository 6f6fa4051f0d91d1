"""Synthetic runs: rows, records and files as training leaves them, for the tests of scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path

from experiments.row import SCHEMA
from scripts.evidence.paper import paper_row
from scripts.evidence.rows import curve

ROOT = Path(__file__).parents[2]
METHODS = [("bp", None), ("fixed_point", 2), ("highway", 0), ("highway", 1), ("highway", 3)]


def row(grad: str, k: int | None, seed: int = 0, **changes: object) -> dict:
    gap = 0.0 if grad == "bp" else 0.1 / (1 + k) + (0.2 if grad == "fixed_point" else 0.0)
    seconds = 10.0 if k is None else 6.0 + k
    return {
        "schema": SCHEMA,
        "experiment": None,
        "model": "resnet20",
        "parameters": 270_000,
        "L": 9,
        "grad": grad,
        "k": k,
        "schedule": None,
        "tolerance": None,
        "gamma": 0.0,
        "group_size": 1,
        "window": None,
        "data": "digits",
        "validation": None,
        "steps": 300,
        "epochs": 10.0,
        "batch_size": 64,
        "lr": 0.1,
        "seed": seed,
        "config_hash": f"{grad}{k}",
        "setup": "one",
        "metric": "eval_accuracy",
        "block_passes": None,
        "sequential_passes": None,
        "commit": "abc123",
        "dirty": False,
        "device": "CPU, 2 threads",
        "torch": "2.13.0",
        "python": "3.11",
        "versions": {},
        "reduced": True,
        "eval_accuracy": 0.97 - gap + 0.004 * seed,
        "eval_loss": 0.1,
        "train_loss": 0.05 + gap,
        "seconds": seconds,
        "cpu_seconds": 0.75 * seconds,
        "seconds_per_step": seconds / 300,
        "peak_memory_mb": 400.0,
        **changes,
    }


def of_paper(key: str, grad: str, k: int | None = None, seed: int = 0, **changes: object) -> dict:
    """A row of the paper's own experiment, in full."""
    paper = paper_row(key)
    mine = {
        "experiment": paper.preset,
        "model": key,
        "data": paper.data,
        "L": paper.L,
        "parameters": paper.parameters,
        "batch_size": paper.batch_size,
        "reduced": False,
        "metric": paper.metric,
        "config_hash": f"{grad}{k}{changes.get('gamma', '')}",
    }
    if paper.metric != "eval_accuracy":
        mine[paper.metric] = 40.0 + (0.0 if k is None else 10.0 / (1 + k)) + 0.5 * seed
    return row(grad, k, seed, **{**mine, **changes})


def records(row: dict) -> list[dict]:
    lines = []
    for step in range(1, row["steps"] + 1):
        seconds = row["seconds_per_step"] * step
        loss = row["train_loss"] + 2.3 * math.exp(-step / 60)
        lines.append(
            {
                "step": step,
                "seconds": seconds,
                "train_loss": loss,
                "lr": 0.1,
                "k": row["k"],
                "grad_norm": 1.0,
                "peak_memory_mb": 400.0,
            }
        )
        if step % 100 == 0:
            lines.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "eval_loss": loss,
                    row["metric"]: row[row["metric"]],
                }
            )
    return lines


def write_rows(file: Path, rows: list[dict], more: list[dict] | None = None) -> None:
    """A results file of these rows; ``more`` records belong to every run."""
    file.write_text(
        "".join(
            json.dumps({**r, "curve": curve(r, records(r) + (more or []))}) + "\n" for r in rows
        )
    )


def write_run(root: Path, row: dict) -> Path:
    folder = root / f"{row['config_hash']}-{row['seed']}"
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps(row))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(row)))
    (folder / "DONE").touch()
    return folder
