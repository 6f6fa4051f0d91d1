"""What there is to judge the paper's claims by: rows by experiment, benchmarks, comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, variance

from scripts.evidence.every_source import Results, read_results
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import Row, method_name, metric_of, score
from scripts.evidence.shown import is_complete, shown_rows

# How much worse than backpropagation still counts as matching it, beside two standard errors.
SLACK = {"eval_accuracy": 0.5, "eval_bits_per_char": 0.01, "eval_perplexity": 2.0}
LEARNED = 0.2  # of the way from a guess to every answer right
SLACK_TEXT = "0.5 points of accuracy, 0.01 bits per character or 2 of perplexity"


@dataclass(frozen=True)
class Evidence:
    """All that is committed under results/.

    Attributes:
        results: rows by setup.
        benches: records of the benchmarks, results/bench_*.json by name.
    """

    results: Results
    benches: dict[str, dict]

    def rows(self, key: str) -> list[Row]:
        """The rows that stand for an experiment of the paper in its figures and tables."""
        return shown_rows(self.results)[key].rows


def read_evidence(results: Path) -> Evidence:
    """Everything in a results folder; a file that cannot be read is told and left out."""
    benches = {
        file.stem: json.loads(file.read_text()) for file in sorted(results.glob("bench_*.json"))
    }
    return Evidence(read_results(results), benches)


def of(rows: Iterable[Row], grad: str, k: int | None = None) -> list[Row]:
    """The rows of a method at one k, Highway-BP at any gamma."""
    return [row for row in rows if row["grad"] == grad and row["k"] == k]


def is_papers(key: str, rows: list[Row]) -> bool:
    """Whether these rows are what the paper ran: its preset, data and size, at full length."""
    return bool(rows) and all(is_complete(paper_rows()[key], row) for row in rows)


def has_learned(key: str, exact: list[Row]) -> bool:
    """Whether backpropagation has come some way from a guess; before, nothing can be compared."""
    classes = paper_rows()[key].classes
    if classes is None:
        return True
    guess = 100.0 / classes
    return fmean(map(score, exact)) >= guess + LEARNED * (100.0 - guess)


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
    return Comparison(
        side_by_side(rows, exact), loss_of(rows) <= loss_of(exact) + allowed, [*rows, *exact]
    )


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
