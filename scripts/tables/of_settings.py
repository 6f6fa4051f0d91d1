"""A table per setting: score, step time and passes of every method, in tables/KEY.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.rows import METRICS, devices_of
from scripts.evidence.settings import Setting
from scripts.figures.draw import step_times
from scripts.tables.table import Table, mean_and_interval, number, table, write_page

NOTE = (
    "Means over seeds, with the 95 % interval of the mean from three seeds on. Step: of all "
    "methods side by side on a quiet machine. Passes: through all blocks of the chain, per step; "
    "in a row: those that wait for each other when every layer has its own device. Memory: the "
    "peak of a run."
)


def of_setting(setting: Setting, folder: Path) -> Table:
    """One line per method; times relative to backpropagation's where both were measured."""
    seconds = step_times(folder, setting) or (lambda arm: None)
    exact = next((seconds(arm) for arm in setting.arms if arm.grad == "bp"), None)
    lines = []
    for arm, rows in setting.arms.items():
        step = seconds(arm)
        lines.append(
            [
                str(arm),
                str(len(rows)),
                mean_and_interval(rows),
                number(None if step is None else 1000 * step, 1, "-"),
                number(step / exact if step and exact else None, 2, "-"),
                number(per_step(rows, "block_passes"), 2, "-"),
                number(per_step(rows, "sequential_passes"), 1, "-"),
                f"{max(row['peak_memory_mb'] for row in rows):.0f}",
            ]
        )
    label = METRICS[setting.paper.metric].label
    columns = ("method", "seeds", label, "step, ms", "x BP", "passes", "in a row", "memory, MB")
    state = "the paper's own setting" if setting.full else "reduced"
    rows = setting.rows
    about = f"{rows[0]['steps']} steps of {rows[0]['batch_size']}, {rows[0]['precision']}, on "
    return table(columns, lines, f"{setting}: {state}", about + devices_of(rows))


def per_step(rows: list, name: str) -> float | None:
    known = [row[name] / row["steps"] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else None


def write(results: Results, key: str) -> Path | None:
    settings = results.settings[key]
    if not settings:
        return None
    tables = [of_setting(setting, results.folder) for setting in settings]
    path = results.folder / "tables" / f"{key}.md"
    return write_page(path, settings[0].paper.title, [NOTE], tables)


def jobs(results: Results) -> Jobs:
    return {key: partial(write, results, key) for key in results.settings}
