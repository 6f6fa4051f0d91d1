"""The recurrent benchmarks in Markdown: speed-ups, where plain BPTT wins, memory.

results/bench_rnn.json (and bench_rnn_NAME.json of other devices) gives tables/bench_rnn.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from experiments.errors import UserError
from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.table import Table, markdown

TITLES = {
    "small": "Long sequences of small steps",
    "paper": "The paper's shapes (Table 6)",
    "grid": "Where it pays, and where plain BPTT wins",
}


def read_record(source: Path) -> dict:
    """A benchmark's record; UserError for a file that is none."""
    try:
        record = json.loads(source.read_text())
        missing = {"environment", "repeats"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{source} is no benchmark's record; measure again") from error
    if missing:
        raise UserError(f"{source} has no {' and no '.join(sorted(missing))}; measure again")
    return record


def sources(folder: Path) -> list[Path]:
    return sorted(folder.glob("bench_rnn*.json"))


def readable_records(folder: Path) -> Iterator[dict]:
    """All records; what cannot be read is told by its own page."""
    for source in sources(folder):
        with suppress(UserError):
            yield read_record(source)


def speed_table(rows: list[dict], heading: str) -> Table:
    """Times faster than torch.nn's layer; where that is faster, the number is bold."""
    names = [name for name in rows[0]["speedup"] if name != "nn"]
    return Table(
        ["shape", "nn, ms", *names],
        [
            [row["shape"], f"{row['ms']['nn']:.1f}", *(relative(row["speedup"][n]) for n in names)]
            for row in rows
        ],
        heading,
    )


def relative(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def memory_table(rows: list[dict]) -> Table:
    names = list(rows[0]["peak"])
    return Table(
        ["shape", *names],
        [
            [row["shape"], *(f"{row['peak'][name]['tensors_mb']:.0f}" for name in names)]
            for row in rows
        ],
        "Peak memory of a step, MB of tensors",
    )


def page(record: dict) -> str:
    environment = record["environment"]
    state = "dirty" if environment["dirty"] else "clean"
    tables = [
        speed_table(record[part], title) for part, title in TITLES.items() if record.get(part)
    ]
    if record.get("memory"):
        tables.append(memory_table(record["memory"]))
    return (
        "\n\n".join(
            [
                "# Recurrent layers beside torch.nn's",
                "Forward and backward, times faster than `nn.GRU` or `nn.LSTM` in the same "
                "process; bold where they are faster. kN is Highway-BP with k = N, kNwS with "
                "windows of S steps, fpN the fixed point, bpttS truncated BPTT. "
                f"{environment['device']}, torch {environment['torch']}, "
                f"commit {environment['commit'][:7]} ({state}), median of "
                f"{record['repeats']}.",
                *map(markdown, tables),
            ]
        )
        + "\n"
    )


def write(source: Path, folder: Path) -> Path:
    path = folder / f"{source.stem}.md"
    path.write_text(page(read_record(source)))
    return path


def jobs(results: Results) -> Jobs:
    return {
        source.stem: partial(write, source, results.folder / "tables")
        for source in sources(results.folder)
    }
