"""Pages of tables: Markdown, and the same in LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean

import pandas as pd

from experiments.files import write_text
from scripts.evidence.rows import Row, metric_of, score
from scripts.evidence.settings import half_interval

MADE = "% needs booktabs; made by `make tables`, changes here are lost\n\n"


@dataclass(frozen=True)
class Table:
    """A table with a line of text cells per entry of ``lines``; the first names the columns."""

    lines: Sequence[Mapping[str, str]]
    heading: str = ""
    note: str = ""

    def markdown(self) -> str:
        """A pipe table, below its heading and note."""
        names = self.lines[0]
        cells = [names, ["---"] * len(names), *(line.values() for line in self.lines)]
        rows = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in cells]
        heading = f"## {self.heading}" if self.heading else ""
        return "\n\n".join(filter(None, [heading, self.note, "\n".join(f"| {r} |" for r in rows)]))

    def latex(self, title: str, label: str) -> str:
        caption = " ".join(filter(None, [f"{title}.", self.heading, self.note]))
        for special in "%_&":
            caption = caption.replace(special, f"\\{special}")
        table = pd.DataFrame(self.lines)
        return table.to_latex(index=False, escape=True, caption=caption, label=label)


@dataclass(frozen=True)
class Page:
    """Tables below a title and notes, in Markdown, and if ``latex`` also in LaTeX."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    latex: bool = False

    def write(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.md"
        tables = [table.markdown() for table in self.tables]
        write_text(path, "\n\n".join([f"# {self.title}", *self.notes, *tables]) + "\n")
        if self.latex:
            parts = [
                table.latex(self.title, f"tab:{name}-{number}")
                for number, table in enumerate(self.tables, start=1)
            ]
            write_text(path.with_suffix(".tex"), MADE + "\n".join(parts))
        return path


def mean_and_interval(rows: Sequence[Row]) -> str:
    """Final score over seeds, "mean ± half of the interval"; "not run" without rows."""
    if not rows:
        return "not run"
    values, digits = [score(row) for row in rows], metric_of(rows[0]).digits
    mean, half = fmean(values), half_interval(values)
    if isnan(mean):
        return "diverged"
    return f"{mean:.{digits}f}" + ("" if isnan(half) else f" ± {half:.{digits}f}")


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
