"""What there is to judge the paper's claims by: rows by experiment, benchmarks, comparisons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, variance

from experiments.errors import UserError
from scripts.every_source import sources
from scripts.paper import paper_rows
from scripts.rows import Row, method_name, metric_of, read_rows, score, setups

# How much worse than backpropagation still counts as matching it, beside two standard errors.
SLACK = {"eval_accuracy": 0.5, "eval_bits_per_char": 0.01, "eval_perplexity": 2.0}
SLACK_TEXT = "0.5 points of accuracy, 0.01 bits per character or 2 of perplexity"


@dataclass(frozen=True)
class Evidence:
    """All that is committed under results/.

    Attributes:
        setups: by experiment, its setups (`scripts.rows.setups`), the fullest first.
        benches: records of the benchmarks, results/bench_*.json by name.
    """

    setups: dict[str, list[list[Row]]]
    benches: dict[str, dict]

    def rows(self, key: str) -> list[Row]:
        """The rows of the fullest setup of an experiment, runs with schedules left out."""
        found = self.setups.get(key)
        return [row for row in found[0] if not row["schedule"]] if found else []


def read_evidence(results: Path) -> Evidence:
    """Everything in a results folder; a file that cannot be read is told and left out."""
    found, benches = {}, {}
    for source in sources(results):
        try:
            found[source.stem] = setups(read_rows(source))
        except UserError as error:
            print(f"error: {error}; left out", file=sys.stderr)
    for file in sorted(results.glob("bench_*.json")):
        benches[file.stem] = json.loads(file.read_text())
    return Evidence(found, benches)


def of(rows: Iterable[Row], grad: str, k: int | None = None) -> list[Row]:
    """The rows of a method at one k, plain: no windows, no tolerance, Highway-BP at any gamma."""
    return [row for row in rows if row["grad"] == grad and row["k"] == k
            and (row["group_size"] or 1) == 1 and not row["tolerance"]]  # fmt: skip


def is_papers(key: str, rows: list[Row]) -> bool:
    """Whether these rows are what the paper ran: its preset, at full length."""
    preset = paper_rows()[key].preset
    return bool(rows) and not any(row["reduced"] or row["experiment"] != preset for row in rows)


@dataclass(frozen=True)
class Comparison:
    """Mean scores of two methods, and whether the first is as good as the second."""

    text: str
    holds: bool
    rows: list[Row]


def matches(rows: list[Row], exact: list[Row]) -> Comparison:
    """Whether ``rows`` score no worse than ``exact``, up to two standard errors or SLACK."""
    a, b = [score(row) for row in rows], [score(row) for row in exact]
    error = sqrt(sum(variance(v) / len(v) for v in (a, b) if len(v) > 1))
    allowed = max(2 * error, SLACK[rows[0]["metric"]])
    return Comparison(side_by_side(rows, exact), loss_of(rows) <= loss_of(exact) + allowed,
                      [*rows, *exact])  # fmt: skip


def better(rows: list[Row], other: list[Row]) -> Comparison:
    """Whether ``rows`` score better in the mean than ``other``."""
    return Comparison(side_by_side(rows, other), loss_of(rows) < loss_of(other), [*rows, *other])


def loss_of(rows: list[Row]) -> float:
    """Mean score, its sign such that less is better."""
    sign = -1.0 if rows[0]["metric"] == "eval_accuracy" else 1.0
    return sign * fmean(score(row) for row in rows)


def side_by_side(rows: list[Row], other: list[Row]) -> str:
    return f"{shown(rows)}; {shown(other)}"


def shown(rows: list[Row]) -> str:
    """For instance "Highway k=3: 46.90 (3 seeds)"."""
    metric = metric_of(rows)
    seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
    return f"{method_name(rows[0])} {fmean(map(score, rows)):.{metric.digits}f} ({seeds})"
