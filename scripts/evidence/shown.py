"""Which rows stand for an experiment of the paper in figures and tables, and what they really are.

A results file may hold several setups: shown is the paper's own at full length if it is there, else
the fullest. Its runs with schedules, windows, groups or tolerances belong to other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.evidence.every_source import Results
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.rows import METHOD_NAMES, Row, by_method, series

METHODS = ("bp", "fixed_point", "highway")
SIZE_SLACK = 0.25  # of the parameters: the parts of GPT-2 make 13.6M, 14.5M are printed


@dataclass(frozen=True)
class Shown:
    """The rows that stand for one experiment; none where it is not yet run.

    Attributes:
        name: of their setup, as in `Results.setups`.
    """

    paper: PaperRow
    name: str
    rows: list[Row]

    @property
    def used(self) -> dict[str, list[Row]]:
        return {self.name: self.rows} if self.rows else {}

    @property
    def complete(self) -> bool:
        """Whether they are what the paper ran: its preset, data and size, in full."""
        return any(is_complete(self.paper, row) for row in self.rows)

    def of(self, grad: str, k: int | None = None) -> list[Row]:
        """The seeds of one method at one k; of Highway-BP's gammas, the main one."""
        return [row for row in self.main() if row["grad"] == grad and row["k"] == k]

    def main(self) -> list[Row]:
        """All, but of Highway-BP one gamma: that of most k, the smallest of those."""
        lines: dict[tuple, list[Row]] = {}
        for row in sorted(self.rows, key=series):
            if row["grad"] == "highway":
                lines.setdefault(series(row), []).append(row)
        best = max(lines.values(), key=lambda rows: len({row["k"] for row in rows}), default=[])
        return [row for row in self.rows if row["grad"] != "highway"] + best

    def gamma(self) -> float | str:
        """Of the main line."""
        return next(iter(Shown(self.paper, self.name, self.main()).gammas()), 0.0)

    def gammas(self) -> set[float | str]:
        return {row["gamma"] or 0.0 for row in self.rows if row["grad"] == "highway"}

    def missing(self, methods: Sequence[str] = METHODS) -> list[str]:
        """Those methods of the sweep that have no row, in words."""
        run = {row["grad"] for row in self.rows}
        return [
            METHOD_NAMES[grad]
            for grad in methods
            if grad not in run and grad in ("bp", *self.paper.sweep)
        ]


def shown_rows(results: Results) -> dict[str, Shown]:
    """What stands for each of the paper's experiments, by key, in the order of Table 2."""
    return {key: _shown(paper, results) for key, paper in paper_rows().items()}


def _shown(paper: PaperRow, results: Results) -> Shown:
    setups = [
        Shown(paper, name, plain)
        for name, rows in results.of(paper.key).items()
        if (plain := [row for row in rows if is_plain(row)])
    ]
    complete = [shown for shown in setups if shown.complete]
    return next(iter(complete + setups), Shown(paper, paper.key, []))


def is_plain(row: Row) -> bool:
    """Whether the run is backpropagation, or a method of the paper with one k and nothing else."""
    return (
        row["grad"] in METHODS
        and not row["schedule"]
        and not row["tolerance"]
        and (row["group_size"] or 1) == 1
    )


def is_complete(paper: PaperRow, row: Row) -> bool:
    """Whether a row is of the paper's own experiment, at full length, scored as the paper does."""
    return (
        row["experiment"] == paper.preset
        and not is_reduced(paper, row)
        and not stands_in(paper, row)
        and not row["validation"]
    )


def is_reduced(paper: PaperRow, row: Row) -> bool:
    """Fewer steps than the recipe's, or fewer examples in each."""
    return row["reduced"] or row["batch_size"] < paper.batch_size


def stands_in(paper: PaperRow, row: Row) -> bool:
    """Whether data or size of the model are not the paper's."""
    return row["data"] != paper.data or other_size(paper, row)


def other_size(paper: PaperRow, row: Row) -> bool:
    n = row["parameters"]
    return n is not None and abs(n / paper.parameters - 1) > SIZE_SLACK


def what_ran(shown: Shown, methods: Sequence[str] = METHODS) -> list[str]:
    """Lines below a panel's title: what stands in, how long, how many seeds, what is missing."""
    if not shown.rows:
        return []
    *lines, length = origin(shown.paper, shown.rows[0])
    missing = shown.missing(methods)
    return [
        *lines,
        f"{length}, {seeds_of(shown.rows)}",
        *([f"not yet run: {', '.join(missing)}"] if missing else []),
    ]


def origin(paper: PaperRow, row: Row) -> list[str]:
    """What stands in, if anything, and for how long."""
    first = [f"stand-in: {stand_in(paper, row)}"] if stands_in(paper, row) else []
    return [*first, how_long(paper, row)]


def how_long(paper: PaperRow, row: Row) -> str:
    """Steps, and whether that is less than the paper's."""
    state = "complete: " if is_complete(paper, row) else "reduced: " * is_reduced(paper, row)
    return f"{state}{steps_of(row)}"


def stand_in(paper: PaperRow, row: Row) -> str:
    """The model and size, and the data, of a row that is not of the paper's own experiment."""
    parts = [row["model"]]
    if other_size(paper, row):
        parts.append(f"{row['parameters'] / 1e6:.2f}M parameters")
    if row["data"] != paper.data:
        parts.append(f"trained on {row['data'].partition(', ')[0]}")
    return ", ".join(parts)


def steps_of(row: Row) -> str:
    return f"{row['steps']} steps of {row['batch_size']}"


def seeds_of(rows: Sequence[Row]) -> str:
    """For instance "1 seed" or "1-3 seeds", of every method and k."""
    counts = sorted({len(group) for group in by_method(rows).values()})
    least, most = counts[0], counts[-1]
    return f"{least if least == most else f'{least}-{most}'} seed{'s' if most > 1 else ''}"


def heading_of(row: Row, key: str) -> tuple[str, list[str]]:
    """Title and lines of a panel, of an experiment of the paper or of one beyond it."""
    papers = paper_rows()
    if key in papers:
        return papers[key].title, origin(papers[key], row)
    reduced = "reduced: " if row["reduced"] else ""
    return f"{row['model']}, {row['data']}", ["beyond the paper", f"{reduced}{steps_of(row)}"]


def in_full(row: Row, key: str) -> bool:
    """Whether a row of KEY.jsonl is the paper's experiment in full; beyond it: not reduced."""
    papers = paper_rows()
    return is_complete(papers[key], row) if key in papers else not row["reduced"]
