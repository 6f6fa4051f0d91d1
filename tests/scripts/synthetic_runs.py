"""Made-up rows, records and folders as training leaves them, for the tests of scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path

from experiments.row import SCHEMA
from scripts.evidence.paper import paper_row, preset_setup
from scripts.evidence.rows import Arm, arm_of, by_arm, curve
from scripts.evidence.settings import Setting

ROOT = Path(__file__).parents[2]
SCORES = {"eval_accuracy": 0.9, "eval_bits_per_char": 2.5, "eval_perplexity": 40.0}


def row(
    key: str,
    grad: str = "bp",
    k: int | None = None,
    seed: int = 0,
    value: float | None = None,
    preset: str | None = None,
    device: str = "cpu",
    **changes: object,
) -> dict:
    """A row of an experiment, in full by default; ``value``: its score as it is stored."""
    paper = paper_row(key)
    preset = preset or paper.preset
    score = SCORES[paper.metric] if value is None else value
    loss = math.log(score) if paper.metric == "eval_perplexity" else 1.0
    arm = Arm(grad, k, changes.get("gamma"), schedule=changes.get("schedule"))
    made = {
        "schema": SCHEMA,
        "config_hash": f"{preset} {arm} {changes.get('carry', '')}",
        "setup": preset_setup(preset, device),
        "seed": seed,
        "device_kind": device,
        "experiment": preset,
        "overrides": [f"experiment={preset}", f"grad={grad}", *([] if k is None else [f"k={k}"])],
        "config": {
            "model": {"carry": changes.pop("carry", "gate")},
            "data": {"classes": paper.classes}
            if paper.classes
            else {"vocabulary": 4096 if paper.metric == "eval_perplexity" else 210},
        },
        "model": "network",
        "parameters": paper.parameters,
        "L": paper.L,
        "grad": grad,
        "k": k,
        "schedule": None,
        "tolerance": None,
        "gamma": 0.0 if grad == "highway" else None,
        "group_size": None if grad == "bp" else 1,
        "window": None,
        "mgrit": None,
        "precision": "float32",
        "data": "made up",
        "steps": 300,
        "epochs": 3.0,
        "batch_size": 128,
        "diverged": False,
        "last_finite_step": 300,
        "metric": paper.metric,
        "train_loss": 1.0,
        "eval_loss": loss,
        paper.metric: score,
        "seconds": 10.0 if k is None else 6.0 + k,
        "cpu_seconds": 5.0,
        "block_passes": 300 * (1 if k is None else k),
        "sequential_passes": 300 * (paper.L if k is None else k),
        "peak_memory_mb": 400.0,
        "commit": "abc1234567",
        "dirty": False,
        "device": "CPU, 1 threads" if device == "cpu" else "a GPU",
        "python": "3.11",
        "torch": "2.13.0",
        "versions": {},
    }
    made |= changes
    return made | {"curve": curve(made, records(made))}


def diverged(key: str, *arm: object, **changes: object) -> dict:
    """A row of a run whose loss became infinite."""
    metric = paper_row(key).metric
    lost = {"diverged": True, "last_finite_step": 120, metric: None, "eval_loss": None}
    return row(key, *arm, **{**lost, **changes})


def seeds(key: str, grad: str, k: int | None, values: list[float], **changes: object) -> list[dict]:
    """A row per value, seeds 0, 1, ..."""
    return [row(key, grad, k, seed, value, **changes) for seed, value in enumerate(values)]


def setting(*arms: list[dict]) -> Setting:
    """The setting that rows of one preset are of."""
    rows = [one for arm in arms for one in arm]
    preset, device = rows[0]["experiment"], rows[0]["device_kind"]
    key = next(key for key in KEYS if preset in presets_of(key))
    return Setting(paper_row(key), preset, device, by_arm(rows))


def presets_of(key: str) -> list[str]:
    paper = paper_row(key)
    return [paper.preset, *paper.reduced]


KEYS = (
    "resnet32",
    "resnet110",
    "resnet56",
    "gpt2",
    "roberta",
    "lstm_chars",
    "gru_chars",
    "gru_words",
    "gru_pixels",
)


def records(row: dict) -> list[dict]:
    lines = []
    for step in range(1, row["steps"] + 1):
        loss = 1.0 + 2.3 * math.exp(-step / 60)
        seconds = row["seconds"] * step / row["steps"]
        lines.append({"step": step, "seconds": seconds, "train_loss": loss, "k": row["k"]})
        if step % 100 == 0:
            at_end = step == row["steps"]
            final = row["eval_loss"] if at_end else (row["eval_loss"] or 1.0) + 0.1
            scored = {row["metric"]: row[row["metric"]], "eval_loss": final}
            lines.append({"step": step, "seconds": seconds, **scored})
    return lines


def moments(*cosines: list[float]) -> dict:
    """Records of the gradient's error, spread over a run: a list over k = 0, 1, ... each."""
    last = len(cosines) - 1
    return [
        {
            "step": round(300 * number / last),
            "gradient_error": [
                {"k": k, "cosine": c, "relative_error": 1 - c, "increment": 0.5**k}
                for k, c in enumerate(found)
            ],
        }
        for number, found in enumerate(cosines)
    ]


def write_rows(folder: Path, key: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def write_run(root: Path, row: dict) -> Path:
    """The folder of a finished run, below a folder of its experiment."""
    key = next(key for key in KEYS if row["experiment"] in presets_of(key))
    name = f"{arm_of(row)}-{row['device_kind']}-s{row['seed']}".replace(" ", "-")
    folder = root / key / name
    folder.mkdir(parents=True)
    bare = {name: value for name, value in row.items() if name != "curve"}
    for file in ("row.json", "started.json"):
        (folder / file).write_text(json.dumps(bare))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(row)))
    (folder / "DONE").touch()
    return folder
