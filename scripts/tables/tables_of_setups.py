"""A table per setup: score, time and memory per method. NAME.jsonl gives tables/NAME.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean

from scripts.evidence.clock import axis_of
from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.rows import Row, by_method, devices_of, mean_and_deviation, metric_of, title
from scripts.evidence.table import Table, markdown

COLUMNS = ("ms per step", "x BP", "processor ms", "peak MB", "passes", "in a row")
NOTE = """X BP: by wall-clock time, or, where other work slowed single-threaded runs, by the
processor's. Processor ms: what the process computed per step, all its threads together; with one
thread, less than "ms per step" where the processor was shared. Passes: through all blocks of the
chain, per step; in a row: those that wait for each other when every layer has its own device."""


def table(rows: list[Row]) -> Table:
    """One line per method; times relative to BP's where BP is among the rows."""
    groups, metric = by_method(rows), metric_of(rows)
    clock = "cpu_seconds" if axis_of(rows) == "processor" else "seconds"
    return Table(
        ("method", "seeds", metric.label, *COLUMNS),
        [
            [name, str(len(group)), spread(group), *costs(group, groups.get("BP"), clock)]
            for name, group in groups.items()
        ],
    )


def _mean(group: list[Row], clock: str) -> float:
    return fmean(row[clock] / row["steps"] for row in group)


def costs(group: list[Row], exact: list[Row] | None, clock: str) -> list[str]:
    """Means over seeds, in the order of COLUMNS; "x BP" on the ``clock`` that can be compared."""
    return [
        f"{1000 * fmean(r['seconds_per_step'] for r in group):.1f}",
        f"{_mean(group, clock) / _mean(exact, clock):.2f}" if exact else "-",
        per_step(group, "cpu_seconds", 1000, 1),
        f"{fmean(r['peak_memory_mb'] for r in group):.0f}",
        per_step(group, "block_passes"),
        per_step(group, "sequential_passes"),
    ]


def spread(group: list[Row]) -> str:
    """Final score over seeds, "mean ± deviation"."""
    digits = metric_of(group).digits
    mean, deviation = mean_and_deviation(group)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def per_step(group: list[Row], key: str, factor: float = 1.0, digits: int = 2) -> str:
    """The mean of a run's sum by its steps; the oldest rows do not have it."""
    values = [r[key] / r["steps"] for r in group if r[key] is not None]
    return f"{factor * fmean(values):.{digits}f}" if values else "-"


def write(rows: list[Row], name: str, folder: Path) -> Path:
    """Write the table of one setup; returns its path."""
    used = ", ".join(f"{row['config_hash']} seed {row['seed']}" for row in rows)
    path = folder / f"{name}.md"
    path.write_text(
        f"# {title(rows[0])}\n\n{markdown(table(rows))}\n\nTimes on {devices_of(rows)}. {NOTE}\n\n"
        f"Rows of {name}: {used}.\n"
    )
    return path


def jobs(results: Results) -> Jobs:
    return {
        name: partial(write, rows, name, results.folder / "tables")
        for name, rows in results.setups.items()
    }
