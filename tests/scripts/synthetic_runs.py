"""Made-up rows, records and folders as training leaves them, for the tests of scripts."""

import json
import math
from pathlib import Path

from experiments.row import FIELDS, NULL, SCHEMA
from scripts.evidence.paper import PaperRow, paper_rows, preset_setup
from scripts.evidence.rows import Arm, Row, arm_of, by_arm, curve
from scripts.evidence.settings import Setting

ROOT = Path(__file__).parents[2]
SCORES = {"eval_accuracy": 0.9, "eval_bits_per_char": 2.5, "eval_perplexity": 40.0}
EMPTY = {name: None if NULL in types else types[0]() for name, types in FIELDS.items()}


def row(
    key: str,
    grad: str = "bp",
    k: int | None = None,
    seed: int = 0,
    value: float | None = None,
    preset: str | None = None,
    device: str = "cpu",
    **changes: object,
) -> Row:
    """A row of an experiment, in full by default; ``value``: its score as it is stored."""
    paper = paper_rows()[key]
    preset = preset or paper.preset
    score = SCORES[paper.metric] if value is None else value
    text = paper.metric == "eval_perplexity"
    arm = Arm(grad, k, changes.get("gamma"), schedule=changes.get("schedule"))
    data = {"classes": paper.classes} if paper.classes else {"vocabulary": 4096 if text else 210}
    made = EMPTY | {
        "schema": SCHEMA,
        "config_hash": f"{preset} {arm} {changes.get('carry', '')}",
        "setup": preset_setup(preset, device),
        "seed": seed,
        "device_kind": device,
        "experiment": preset,
        "overrides": [f"experiment={preset}", f"grad={grad}", *([] if k is None else [f"k={k}"])],
        "config": {"model": {"carry": changes.pop("carry", "gate")}, "data": data},
        "parameters": paper.parameters,
        "L": paper.L,
        "grad": grad,
        "k": k,
        "gamma": 0.0 if grad == "highway" else None,
        "group_size": None if grad == "bp" else 1,
        "steps": 300,
        "batch_size": 128,
        "metric": paper.metric,
        "eval_loss": math.log(score) if text else 1.0,
        paper.metric: score,
        "seconds": 10.0 if k is None else 6.0 + k,
        "block_passes": 300 * (1 if k is None else k),
        "sequential_passes": 300 * (paper.L if k is None else k),
        "peak_memory_mb": 400.0,
        "commit": "abc1234567",
        "device": "CPU, 1 threads" if device == "cpu" else "a GPU",
    }
    made |= changes
    return made | {"curve": curve(made, records(made))}


def diverged(key: str, *arm: object, **changes: object) -> Row:
    """A row of a run whose loss became infinite."""
    metric = paper_rows()[key].metric
    lost = {"diverged": True, "last_finite_step": 120, metric: None, "eval_loss": None}
    return row(key, *arm, **{**lost, **changes})


def seeds(key: str, grad: str, k: int | None, values: list[float], **changes: object) -> list[Row]:
    """A row per value, seeds 0, 1, ..."""
    return [row(key, grad, k, seed, value, **changes) for seed, value in enumerate(values)]


def setting(*arms: list[Row]) -> Setting:
    """The setting that rows of one preset are of."""
    rows = [one for arm in arms for one in arm]
    return Setting(paper_of(rows[0]), rows[0]["experiment"], rows[0]["device_kind"], by_arm(rows))


def paper_of(row: Row) -> PaperRow:
    return next(paper for paper in paper_rows().values() if row["experiment"] in paper.presets)


def records(row: Row) -> list[dict]:
    lines = []
    for step in range(1, row["steps"] + 1):
        seconds = row["seconds"] * step / row["steps"]
        loss = 1.0 + 2.3 * math.exp(-step / 60)
        lines.append({"step": step, "seconds": seconds, "train_loss": loss, "k": row["k"]})
        if step % 100 == 0:
            final = row["eval_loss"]
            if step < row["steps"]:
                final = (final or 1.0) + 0.1
            scored = {row["metric"]: row[row["metric"]], "eval_loss": final}
            lines.append({"step": step, "seconds": seconds, **scored})
    return lines


def moments(*cosines: list[float]) -> list[dict]:
    """Records of the gradient's error, spread over a run: a list over k = 0, 1, ... each."""
    return [
        {
            "step": round(300 * number / (len(cosines) - 1)),
            "gradient_error": [
                {"k": k, "cosine": c, "relative_error": 1 - c, "increment": 0.5**k}
                for k, c in enumerate(found)
            ],
        }
        for number, found in enumerate(cosines)
    ]


def lines_of(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_rows(folder: Path, key: str, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key}.jsonl"
    file.write_text(lines_of(rows))
    return file


def write_run(root: Path, row: Row) -> Path:
    """The folder of a finished run, below a folder of its experiment."""
    name = f"{arm_of(row)}-{row['device_kind']}-s{row['seed']}".replace(" ", "-")
    folder = root / paper_of(row).key / name
    folder.mkdir(parents=True)
    bare = json.dumps({name: value for name, value in row.items() if name != "curve"})
    (folder / "row.json").write_text(bare)
    (folder / "started.json").write_text(bare)
    (folder / "metrics.jsonl").write_text(lines_of(records(row)))
    (folder / "DONE").touch()
    return folder
