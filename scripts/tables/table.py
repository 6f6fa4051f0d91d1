"""Pages of tables: Markdown, and the same in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from scripts.evidence.rows import Row, metric_of, score
from scripts.figures.draw import interval


@dataclass(frozen=True)
class Table:
    """Cells of text by column, and what a reader must know to read them."""

    cells: pd.DataFrame
    heading: str = ""
    note: str = ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], heading="", note="") -> Table:
    return Table(pd.DataFrame(list(rows), columns=list(columns)), heading, note)


def markdown(table: Table) -> str:
    """A pipe table, below its heading and note."""
    lines = [
        list(table.cells.columns),
        ["---"] * table.cells.shape[1],
        *table.cells.values.tolist(),
    ]
    parts = [
        f"## {table.heading}" if table.heading else "",
        table.note,
        "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in lines),
    ]
    return "\n\n".join(filter(None, parts))


def write_page(
    path: Path, title: str, notes: Sequence[str], tables: Sequence[Table], latex: bool = False
) -> Path:
    """A Markdown page of tables, perhaps the same in LaTeX beside it; returns the page's path."""
    path.write_text("\n\n".join([f"# {title}", *notes, *map(markdown, tables)]) + "\n")
    if latex:
        parts = [
            t.cells.to_latex(
                index=False,
                escape=True,
                caption=_plain(" ".join(filter(None, [f"{title}.", t.heading, t.note]))),
                label=f"tab:{path.stem}-{number}",
            )
            for number, t in enumerate(tables, start=1)
        ]
        head = "% needs booktabs; made by `make tables`, changes here are lost\n\n"
        path.with_suffix(".tex").write_text(head + "\n".join(parts))
    return path


def _plain(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")


def mean_and_interval(rows: Sequence[Row]) -> str:
    """Final score over seeds, "mean ± half of the interval"; "not run" without rows."""
    if not rows:
        return "not run"
    values, digits = [score(row) for row in rows], metric_of(rows[0]).digits
    half, mean = interval(values), sum(values) / len(values)
    text = "diverged" if mean != mean else f"{mean:.{digits}f}"
    return text + ("" if half is None else f" ± {half:.{digits}f}")


def ratio(ours: float | None, papers: float | None) -> str:
    return "-" if ours is None or papers is None else f"{ours / papers:.2f}"


def number(value: float | None, digits: int, missing: str = "not measured") -> str:
    return missing if value is None else f"{value:.{digits}f}"
