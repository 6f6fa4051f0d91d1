"""Write every results file as a Markdown table: score, time and memory per method.

    python scripts/make_tables.py results

NAME.jsonl gives tables/NAME.md, which ends with the rows that were used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.every_source import for_every_source, run
from scripts.rows import Row, by_method, devices_of, metric_of, score, title

HEADER = """\
| method | seeds | {score} | ms per step | x BP | processor ms | peak MB | passes | in a row |
|---|---|---|---|---|---|---|---|---|"""
NOTE = """Processor ms: what the process computed per step, all its threads together; with one
thread, less than "ms per step" where the processor was shared. Passes: through all blocks of the
chain, per step; in a row: those that wait for each other when every layer has its own device."""


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def table(rows: list[Row]) -> str:
    """One line per method; times relative to BP's where BP is among the rows."""
    groups = by_method(rows)
    step = {name: fmean(r["seconds_per_step"] for r in group) for name, group in groups.items()}
    metric = metric_of(rows)
    lines = [HEADER.format(score=metric.label)]
    for name, group in groups.items():
        final = spread([score(row) for row in group], metric.digits)
        ratio = f"{step[name] / step['BP']:.2f}" if "BP" in step else "-"
        memory = fmean(row["peak_memory_mb"] for row in group)
        lines.append(
            f"| {name} | {len(group)} | {final} | {1000 * step[name]:.1f} | {ratio} "
            f"| {per_step(group, 'cpu_seconds', 1000, 1)} | {memory:.0f} "
            f"| {per_step(group, 'block_passes')} | {per_step(group, 'sequential_passes')} |"
        )
    return "\n".join(lines)


def per_step(group: list[Row], key: str, factor: float = 1.0, digits: int = 2) -> str:
    """The mean of a run's sum by its steps; the oldest rows do not have it."""
    values = [r[key] / r["steps"] for r in group if r[key] is not None]
    return f"{factor * fmean(values):.{digits}f}" if values else "-"


def page(rows: list[Row], name: str) -> str:
    used = ", ".join(f"{row['config_hash']} seed {row['seed']}" for row in rows)
    return (
        f"# {title(rows[0])}\n\n{table(rows)}\n\nTimes on {devices_of(rows)}. {NOTE}\n\n"
        f"Rows of {name}: {used}.\n"
    )


def write(rows: list[Row], name: str, results: Path) -> Path:
    """Write the table of one setup; returns its path."""
    path = results / "tables" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(rows, name))
    return path


def main(argv: Sequence[str]) -> None:
    for_every_source(__doc__.splitlines()[0], write, argv)


if __name__ == "__main__":
    run(main)
