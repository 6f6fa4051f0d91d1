"""Rows of finished runs: read, name, order and thin them; experiments/row.py lists their fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UserError
from experiments.files import read_json_lines
from experiments.row import check_row, key_of

Row = dict[str, Any]
METHOD_NAMES = {
    "bp": "BP",
    "truncated_bptt": "Truncated BPTT",
    "fixed_point": "FP",
    "mgrit": "MGRIT",
    "highway": "Highway",
}
CURVE_POINTS = 60


class Metric(NamedTuple):
    """A score as figures and tables show it; worse: the unit of `settings.error_score`."""

    label: str
    factor: float
    digits: int
    worse: str


METRICS = {
    "eval_accuracy": Metric("accuracy (%)", 100.0, 2, "points worse"),
    "eval_bits_per_char": Metric("bits per character", 1.0, 3, "bits worse"),
    "eval_perplexity": Metric("perplexity", 1.0, 1, "in log perplexity"),
}


def metric_of(row: Row) -> Metric:
    return METRICS[row["metric"]]


def score(row: Row) -> float:
    """A run's final score in the units of its `Metric`; nan if the run diverged."""
    value = row[row["metric"]]
    return float("nan") if value is None else metric_of(row).factor * value


class Arm(NamedTuple):
    """A run's whole gradient method: in one setting, runs of one arm differ in seed alone."""

    grad: str
    k: int | None = None
    gamma: float | str | None = None
    group_size: int | None = None
    tolerance: float | None = None
    window: int | None = None
    schedule: str | None = None
    mgrit: str | None = None
    carry: str = "gate"

    @property
    def plain(self) -> bool:
        """Whether this is backpropagation, or Highway-BP or the fixed point without extras."""
        methods = ("bp", "fixed_point", "highway")
        extras = (self.tolerance, self.schedule, (self.group_size or 1) > 1)
        return self.grad in methods and not any(extras) and self.carry == "gate"

    @property
    def series(self) -> Arm:
        """This arm without its k: the arms of a line over k share one series."""
        return self._replace(k=None)

    @property
    def order(self) -> tuple:
        """Sort key: methods as in `METHOD_NAMES`, then a user's own; gamma and so on; last k."""
        rest = (str(self.gamma or 0.0), self.group_size or 1, str(self[4:]))
        return ([*METHOD_NAMES, self.grad].index(self.grad), self.grad, *rest, self.k or 0)

    def __str__(self) -> str:
        """For instance "BP", "FP k=3", "Highway gamma=0.2 k=3"."""
        parts = (
            METHOD_NAMES.get(self.grad, self.grad),
            f"gamma={self.gamma}" if self.gamma else "",
            f"groups of {self.group_size}" if (self.group_size or 1) > 1 else "",
            f"tolerance {self.tolerance}" if self.tolerance else "",
            f"carry={self.carry}" if self.carry != "gate" else "",
            str(self.window or ""),
            f"k={self.k}" if self.k is not None else "",
            self.schedule,
            self.mgrit,
        )
        return " ".join(filter(None, parts))


def arm_of(row: Row) -> Arm:
    carry = row["config"]["model"].get("carry", "gate") if row["grad"] != "bp" else "gate"
    return Arm(*(row[name] for name in Arm._fields[:-1]), carry)


def by_arm(rows: Iterable[Row]) -> dict[Arm, list[Row]]:
    """The rows of every arm by seed; the arms are in the order of `Arm.order`."""
    groups: dict[Arm, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (arm_of(row).order, row["seed"])):
        groups.setdefault(arm_of(row), []).append(row)
    return groups


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if the file does not exist.

    Raises:
        UserError: a line is not a row of the present schema, or two rows belong to one run.
    """
    rows = read_json_lines(path) if path.exists() else []
    lines: dict[tuple, int] = {}
    for number, row in enumerate(rows, start=1):
        check_row(row, f"{path} line {number}")
        first = lines.setdefault(key_of(row), number)
        if first != number:
            raise UserError(
                f"{path} lines {first} and {number} are of one run ({name_of_run(row)}); "
                "delete one of them"
            )
    return rows


def name_of_run(row: Row) -> str:
    """For instance "1a2b3c4d on cpu, seed 0"."""
    return f"{row['config_hash']} on {row['device_kind']}, seed {row['seed']}"


def curve(row: Row, records: Sequence[dict]) -> dict[str, Any]:
    """The training and evaluation curves of a run as columns, thinned.

    If the gradient's error was measured, the curve has the error of every moment and k.
    """
    columns = {"train": ("step", "train_loss"), "eval": ("step", "eval_loss", row["metric"])}
    found: dict[str, Any] = {}
    for part, names in columns.items():
        kept = thin([r for r in records if f"{part}_loss" in r])
        found[part] = {name: [record[name] for record in kept] for name in names}
    names = ("k", "cosine", "relative_error", "increment")
    moments = [
        {"step": r["step"]} | {n: [e[n] for e in r["gradient_error"]] for n in names}
        for r in records
        if "gradient_error" in r
    ]
    return found | ({"gradient_error": moments} if moments else {})


def thin(records: list[dict], points: int = CURVE_POINTS) -> list[dict]:
    """At most ``points`` of the records, evenly spaced, the first and the last among them."""
    if len(records) <= points:
        return records
    last = len(records) - 1
    return [records[round(i * last / (points - 1))] for i in range(points)]


def read_run(folder: Path) -> tuple[Row, list[dict]]:
    """Row and metrics records of a finished run; UserError if they are missing or damaged."""
    try:
        row = json.loads((folder / "row.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/row.json cannot be read; run it again") from error
    check_row(row, f"{folder}/row.json")
    records = read_json_lines(folder / "metrics.jsonl", "step")
    if not row["diverged"] and not any("train_loss" in record for record in records):
        raise UserError(f"{folder}/metrics.jsonl has no records of training; run it again")
    return row, records


def finished_runs(root: Path) -> list[tuple[Row, list[dict]]]:
    """(row, metrics records) of every run folder below ``root`` that has DONE, BP first."""
    runs = [read_run(done.parent) for done in root.rglob("DONE")]
    if not runs:
        raise UserError(f"no finished runs under {root}; expected run folders that contain DONE")
    return sorted(runs, key=lambda run: (arm_of(run[0]).order, run[0]["seed"]))


def devices_of(rows: Iterable[Row]) -> str:
    return " and ".join(sorted({row["device"] for row in rows}))


def rows_used(rows: Iterable[Row], picture: str) -> str:
    """The text of NAME.rows.txt: a line per row that a picture was drawn from."""
    lines = [
        f"{row['experiment']}, {arm_of(row)}, {name_of_run(row)}: commit {row['commit'][:10]}"
        f"{' (dirty)' if row['dirty'] else ''}, {row['device']}, torch {row['torch']}"
        for row in rows
    ]
    return "\n".join([f"rows in {picture}:", *(lines or ["none"])]) + "\n"
