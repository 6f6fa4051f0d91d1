"""Write every results file as a Markdown table: score, time and memory per method.

    python scripts/make_tables.py results

NAME.jsonl gives tables/NAME.md, which ends with the rows that were used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from scripts.rows import Row, by_method, devices_of, metric_of, read_json_lines, score, setup_of

HEADER = """| method | seeds | {score} | ms per step | x BP | processor ms | peak memory MB |
|---|---|---|---|---|---|---|"""
NOTE = """Processor ms: what the process computed per step, all its threads together; with one
thread, less than "ms per step" where the processor was shared."""


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
            f"| {processor(group)} | {memory:.0f} |"
        )
    return "\n".join(lines)


def processor(group: list[Row]) -> str:
    """Processor time of a step; the oldest rows do not have it."""
    times = [r["cpu_seconds"] / r["steps"] for r in group if "cpu_seconds" in r]
    return f"{1000 * fmean(times):.1f}" if times else "-"


def page(rows: list[Row], source: Path) -> str:
    used = ", ".join(f"{row['config_hash']} seed {row['seed']}" for row in rows)
    title = setup_of(rows, source)
    return (
        f"# {title}\n\n{table(rows)}\n\nTimes on {devices_of(rows)}. {NOTE}\n\n"
        f"Rows of {source.name}: {used}.\n"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with NAME.jsonl files")
    args = parser.parse_args(argv)
    sources = sorted(args.results.glob("*.jsonl"))
    if not sources:
        raise UserError(f"no *.jsonl in {args.results}; collect runs with scripts/collect_rows.py")
    folder = args.results / "tables"
    folder.mkdir(exist_ok=True)
    for source in sources:
        path = folder / f"{source.stem}.md"
        path.write_text(page(read_json_lines(source), source))
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
