"""Recurrent layers beside torch.nn's, beyond the paper's shapes: tables/bench_rnn.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scripts.evidence.results_io import Jobs, Results
from scripts.tables.of_paper import described
from scripts.tables.table import Table, table, write_page

TITLES = {
    "small": "Long sequences of small steps",
    "grid": "Where it pays, and where plain BPTT wins",
}
NOTE = (
    "Forward and backward, times faster than `nn.GRU` or `nn.LSTM` in the same process; bold where "
    "they are faster. kN is Highway-BP with k = N, kNwS with windows of S steps, fpN the fixed "
    "point, bpttS truncated BPTT."
)


def speeds(rows: list[dict], heading: str) -> Table:
    names = [name for name in rows[0]["speedup"] if name != "nn"]
    lines = [
        [row["shape"], f"{row['ms']['nn']:.1f}", *(relative(row["speedup"][n]) for n in names)]
        for row in rows
    ]
    return table(["shape", "nn, ms", *names], lines, heading)


def relative(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def memory(rows: list[dict]) -> Table:
    names = list(rows[0]["peak"])
    lines = [
        [row["shape"], *(f"{row['peak'][name]['tensors_mb']:.0f}" for name in names)]
        for row in rows
    ]
    return table(["shape", *names], lines, "Peak memory of a step, MB of tensors")


def write(results: Results) -> Path | None:
    record = results.records("bench_rnn.json").get("bench_rnn")
    if record is None:
        return None
    tables = [speeds(record[part], title) for part, title in TITLES.items() if record.get(part)]
    tables += [memory(record["memory"])] if record.get("memory") else []
    path = results.folder / "tables" / "bench_rnn.md"
    title = "Recurrent layers beside torch.nn's"
    return write_page(path, title, [NOTE, f"On {described(record)}."], tables)


def jobs(results: Results) -> Jobs:
    return {"bench_rnn": partial(write, results)}
