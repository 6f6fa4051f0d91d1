"""One table, two renderings: Markdown and LaTeX. Its cells are text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PREAMBLE = "% needs booktabs and graphicx; made by `make tables`, changes here are lost\n\n"
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "_": r"\_",
        "%": r"\%",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
        "|": r"$|$",
        "±": r"$\pm$",
    }
)
NUMBER = re.compile(r"(\*\*)?[+-]?\d")
NO_NUMBER = re.compile(r"-$|not ")  # gaps stand where numbers would
LONG = 40  # characters from which on a column of text is broken into lines, in LaTeX
WIDE = 100  # characters from which on a table is scaled to the page's width


@dataclass(frozen=True)
class Table:
    """Columns by name, rows of as many cells, and what a reader must know to read them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{row} has {len(row)} cells; expected {len(self.columns)}")

    def cells_of(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]

    def is_right(self, column: int) -> bool:
        """Whether a column is of numbers and gaps alone, and stands to the right."""
        return all(NUMBER.match(cell) or NO_NUMBER.match(cell) for cell in self.cells_of(column))

    def width(self, column: int) -> int:
        """Characters of its longest cell."""
        return max(map(len, (self.columns[column], *self.cells_of(column))))


def markdown(table: Table) -> str:
    """A pipe table, below its heading and note."""
    rule = ["---:" if table.is_right(c) else "---" for c in range(len(table.columns))]
    lines = [table.columns, rule, *table.rows]
    parts = [
        f"## {table.heading}" if table.heading else "",
        table.note,
        "\n".join("| " + " | ".join(_in_markdown(cells)) + " |" for cells in lines),
    ]
    return "\n\n".join(filter(None, parts))


def _in_markdown(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", r"\|") for cell in cells]


def latex(table: Table, label: str, notes: Sequence[str] = ()) -> str:
    """A booktabs tabular in a table environment; heading and notes are its caption."""
    caption = " ".join(filter(None, (*notes, table.heading and f"{table.heading}.", table.note)))
    columns = range(len(table.columns))
    widths = [min(table.width(column), LONG) for column in columns]
    wide = sum(widths) > WIDE
    aligned = "".join(_latex_column(table, column) for column in columns)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\footnotesize",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{tab:{label}}}",
            *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
            rf"\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            _latex_line(table.columns),
            r"\midrule",
            *map(_latex_line, table.rows),
            r"\bottomrule",
            r"\end{tabular}" + "}" * wide,
            r"\end{table}",
        ]
    )


def _latex_column(table: Table, column: int) -> str:
    if table.is_right(column):
        return "r"
    return f"p{{{LONG // 2}em}}" if table.width(column) > LONG else "l"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(LATEX)


def write_page(path: Path, title: str, notes: Sequence[str], tables: Sequence[Table]) -> Path:
    """A Markdown page of tables, and the same in LaTeX beside it; returns the page's path."""
    path.write_text("\n\n".join([f"# {title}", *notes, *map(markdown, tables)]) + "\n")
    labels = [
        path.stem if number == 0 else f"{path.stem}-{number + 1}" for number in range(len(tables))
    ]
    parts = [
        latex(table, label, [f"{title}.", *notes])
        for table, label in zip(tables, labels, strict=True)
    ]
    path.with_suffix(".tex").write_text(PREAMBLE + "\n\n".join(parts) + "\n")
    return path
