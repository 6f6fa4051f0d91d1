"""Rows of finished runs: read them from run folders or results files, name and group them.

A row is a flat dict; experiments/row.py lists its fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev

from experiments.errors import UserError
from experiments.row import check_row

Row = dict
METHOD_NAMES = {
    "bp": "BP",
    "truncated_bptt": "Truncated BPTT",
    "fixed_point": "FP",
    "mgrit": "MGRIT",
    "highway": "Highway",
}
CURVE_POINTS = 60
Columns = dict[str, list[float]]


@dataclass(frozen=True)
class Metric:
    """A score as figures and tables show it: label, factor, digits after the point."""

    label: str
    factor: float
    digits: int


METRICS = {
    "eval_accuracy": Metric("accuracy (%)", 100.0, 2),
    "eval_bits_per_char": Metric("bits per character", 1.0, 3),
    "eval_perplexity": Metric("perplexity", 1.0, 1),
}


def metric_of(rows: Iterable[Row]) -> Metric:
    """That of all rows of one setup."""
    return METRICS[next(iter(rows))["metric"]]


def score(row: Row) -> float:
    """A run's final score in the units of its `Metric`."""
    return METRICS[row["metric"]].factor * row[row["metric"]]


def mean_and_deviation(rows: Sequence[Row]) -> tuple[float, float | None]:
    """Of the final score over seeds; a single seed, or one that diverged, has no deviation."""
    values = [score(row) for row in rows]
    known = len(values) > 1 and all(map(isfinite, values))
    return fmean(values), stdev(values) if known else None


def read_json_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file; UserError naming file and line for a broken one."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON; expected one record") from error
    return records


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        UserError: the file is empty, a line is not a row of the present schema (missing and
            unknown fields are named), its gradient method is unknown, its curve lacks columns, or
            two rows are of one run.
    """
    rows = read_json_lines(path)
    if not rows:
        raise UserError(f"{path} is empty; expected one row per finished run")
    lines: dict[tuple[str, int], int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path} line {number}"
        check_row(row, where)
        check_method(row, where)
        check_curve(row, where)
        first = lines.setdefault(run_of(row), number)
        if first != number:
            run = f"{row['config_hash']}, seed {row['seed']}"
            raise UserError(
                f"{path} lines {first} and {number} are of one run ({run}); delete one of them"
            )
    return rows


def check_method(row: Row, where: str) -> None:
    """UserError for a gradient method, or a word for gamma, that figures have no look for."""
    if row["grad"] not in METHOD_NAMES:
        raise UserError(
            f"{where}: grad is {row['grad']!r}, expected one of {', '.join(METHOD_NAMES)}"
        )
    if isinstance(row["gamma"], str) and row["gamma"] != "auto":
        raise UserError(f"{where}: gamma is {row['gamma']!r}, expected a number, auto or null")


def check_curve(row: Row, where: str) -> None:
    """UserError where a column of the row's curve is missing, or columns differ in length."""
    curves = row.get("curve", {})
    for part, names in curve_columns(row).items():
        columns = curves[part] if isinstance(curves.get(part), dict) else {}
        lengths = {len(columns[name]) if name in columns else None for name in names}
        if len(lengths) > 1 or None in lengths:
            raise UserError(
                f"{where}: curve, {part}: expected the columns {', '.join(names)}, "
                "all of one length"
            )


def curve_columns(row: Row) -> dict[str, tuple[str, ...]]:
    """The columns of a row's curve, those of its training and those of its evaluations."""
    return {
        "train": ("step", "seconds", "train_loss"),
        "eval": ("step", "seconds", "eval_loss", row["metric"]),
    }


def run_of(row: Row) -> tuple[str, int]:
    """What a run is known by: its configuration's hash and its seed."""
    return row["config_hash"], row["seed"]


def setups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may be compared together: complete runs first, then those of most examples, then
    the largest number of them."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["setup"], title(row), row["lr"]), []).append(row)
    return sorted(
        groups.values(),
        key=lambda g: (g[0]["reduced"], -g[0]["steps"] * g[0]["batch_size"], -len(g)),
    )


def finished_runs(root: Path) -> list[tuple[Row, list[dict]]]:
    """(row, metrics records) of every run folder below ``root`` that has DONE, BP first."""
    runs = []
    for done in root.rglob("DONE"):
        try:
            row = json.loads((done.parent / "row.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{done.parent}/row.json cannot be read; run it again") from error
        check_row(row, f"{done.parent}/row.json")
        runs.append((row, read_json_lines(done.parent / "metrics.jsonl")))
    if not runs:
        raise UserError(f"no finished runs under {root}; expected run folders that contain DONE")
    return sorted(runs, key=lambda run: order(run[0]))


def order(row: Row) -> tuple:
    """Sort key: BP, fixed point, Highway; then gamma, group size, schedule, k, seed."""
    return (*series(row), row["k"] or 0, row["seed"])


def series(row: Row) -> tuple[int, str, int, str]:
    """What one line of a figure over k has in common: all of the method but k, and its schedule."""
    names = list(METHOD_NAMES)
    size = row["group_size"] or row["window"] or 1
    rest = f"{row['tolerance'] or ''} {row['schedule'] or ''}"
    return names.index(row["grad"]), str(row["gamma"] or 0.0), size, rest


def has_k(row: Row) -> bool:
    """Whether the run has one k; backpropagation has none, a schedule several."""
    return row["k"] is not None


def series_name(row: Row) -> str:
    gamma = f", gamma={row['gamma']}" if row["gamma"] else ""
    groups = f", groups of {row['group_size']}" if (row["group_size"] or 1) > 1 else ""
    stops = f", tolerance {row['tolerance']}" if row["tolerance"] else ""
    return METHOD_NAMES[row["grad"]] + gamma + groups + stops


def method_name(row: Row) -> str:
    """For instance "BP", "FP k=3", "Highway k=3"."""
    if row["grad"] == "truncated_bptt":
        return f"Truncated BPTT {row['window']}"
    if row["grad"] == "bp":
        return "BP"
    if row["grad"] == "mgrit":
        return f"MGRIT {row['mgrit']}"
    return f"{series_name(row)} {row['schedule'] or 'k=' + str(row['k'])}"


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one method together (its seeds), in the order of `order`."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=order):
        groups.setdefault(method_name(row), []).append(row)
    return groups


def setup_of(rows: Iterable[Row], where: Path) -> str:
    """Model, data and steps, which all rows must share to be comparable, as a title."""
    titles = {title(row) for row in rows}
    if len(titles) != 1:
        raise UserError(f"{where} mixes {' and '.join(sorted(titles))}; expected only one of them")
    return titles.pop()


def title(row: Row) -> str:
    """What a run trained, for how long, and whether that is less than its recipe says."""
    return f"{row['model']}{size(row)} on {row['data']}, {length(row)}"


def size(row: Row) -> str:
    """The number of parameters where the row has it."""
    n = row["parameters"]
    return "" if n is None else f" ({n / 1e6:.2f}M parameters)"


def length(row: Row) -> str:
    text = f"{row['steps']} steps of batch {row['batch_size']}"
    return f"reduced run: {text}" if row["reduced"] else text


def devices_of(rows: Iterable[Row]) -> str:
    """The devices the times were measured on: never compare times across two of them."""
    return " and ".join(sorted({row["device"] for row in rows}))


def rows_used(used: Mapping[str, Iterable[Row]], picture: Path) -> str:
    """What a picture was drawn from, a line per row: by setup, KEY being the first of KEY.jsonl."""
    lines = []
    for name, rows in used.items():
        lines.append(f"rows of {name} in {picture.name}:")
        lines += [_provenance(row) for row in sorted(rows, key=order)]
    return "\n".join(lines or [f"no rows in {picture.name}"]) + "\n"


def _provenance(row: Row) -> str:
    state = "dirty" if row["dirty"] else "clean"
    return (
        f"{row['config_hash']} seed {row['seed']}: {method_name(row)}, commit {row['commit']} "
        f"({state}), {row['device']}, torch {row['torch']}"
    )


def thin(records: list[dict], points: int = CURVE_POINTS) -> list[dict]:
    """At most ``points`` of the records, evenly spaced, the first and the last among them."""
    if len(records) <= points:
        return records
    last = len(records) - 1
    return [records[round(i * last / (points - 1))] for i in range(points)]


def curve(row: Row, records: list[dict]) -> dict[str, Columns | list[dict]]:
    """The training and evaluation curves of a run as columns, thinned; seconds of training.

    Where the gradient's error was measured, it is there for every moment and k.
    """
    measured = [r for r in records if "gradient_error" in r]
    return {
        **{
            part: _columns(thin([r for r in records if f"{part}_loss" in r]), names)
            for part, names in curve_columns(row).items()
        },
        **({"gradient_error": _moments(measured)} if measured else {}),
    }


def _moments(records: list[dict]) -> list[dict]:
    """A moment each: step, and a list over k of every score."""
    names = ("k", "cosine", "relative_error", "increment")
    return [
        {"step": r["step"]} | {n: [e[n] for e in r["gradient_error"]] for n in names}
        for r in records
    ]


def _columns(records: list[dict], names: tuple[str, ...]) -> Columns:
    return {name: [record[name] for record in records] for name in names}
