"""Which measured signal tells what a k costs in the end: gradient errors beside final losses.

Of every NAME.jsonl with runs of one k, and a run of backpropagation that measured the gradient's
error (diagnostics=figure6): per k the mean over all moments of the relative error, of one minus
the cosine, and of the increment that the next k measured would bring; and by how much the final
loss is above backpropagation's. Written to results/tables/signals.md with the rank correlation of
each signal with that excess, over all pairs of a network and a k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import pandas as pd

from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.rows import Row
from scripts.evidence.table import Table, markdown

SIGNALS = ("relative_error", "one_minus_cosine", "next_increment")


def signals(rows: Sequence[Row]) -> pd.DataFrame:
    """Mean over moments and seeds, a row per k."""
    moments = [
        pd.DataFrame(moment).assign(
            one_minus_cosine=lambda t: 1 - t["cosine"],
            next_increment=lambda t: t["increment"].shift(-1),
        )
        for row in rows
        for moment in row["curve"].get("gradient_error", ())
    ]
    return pd.concat(moments).groupby("k")[list(SIGNALS)].mean() if moments else pd.DataFrame()


def excess_losses(rows: Sequence[Row], exact: Sequence[Row]) -> dict[int, float]:
    """Mean final loss of every k above backpropagation's mean, relative to that."""
    base = fmean(row["eval_loss"] for row in exact)
    by_k: dict[int, list[float]] = {}
    for row in rows:
        by_k.setdefault(row["k"], []).append(row["eval_loss"])
    return {k: fmean(losses) / base - 1 for k, losses in sorted(by_k.items())}


def pairs(rows: Sequence[Row]) -> pd.DataFrame:
    """A row per k of one setup, empty where nothing was measured."""
    rows = [row for row in rows if not row["schedule"]]
    exact = [row for row in rows if row["grad"] == "bp"]
    plain = [
        row
        for row in rows
        if row["grad"] == "highway" and not row["gamma"] and row["group_size"] == 1
    ]
    table = signals(exact)
    if table.empty or not plain:
        return pd.DataFrame()
    table["excess_loss"] = pd.Series(excess_losses(plain, exact))
    table.insert(0, "network", rows[0]["model"])
    return table.dropna(subset="excess_loss").reset_index()


def page(table: pd.DataFrame) -> str:
    head = ["network", "k", *SIGNALS, "excess_loss"]
    cells = [
        [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        for row in table[head].itertuples(index=False)
    ]
    ranks = [f"- {name.replace('_', ' ')}: {correlation(table, name):.2f}" for name in SIGNALS]
    return (
        "# What a measured signal tells of the final loss\n\n"
        + markdown(Table([name.replace("_", " ") for name in head], cells))
        + "\n\nRank correlation with the excess loss, over all lines that have both:\n\n"
        + "\n".join(ranks)
        + "\n"
    )


def correlation(table: pd.DataFrame, signal: str) -> float:
    return table[signal].corr(table["excess_loss"], method="spearman")


def write(results: Results) -> Path | None:
    """tables/signals.md; without runs that measured, only a word on what makes them."""
    found = [table for rows in results.setups.values() if not (table := pairs(rows)).empty]
    if not found:
        print(
            f"no signals.md: no run in {results.folder} measured the gradient's error; run "
            "backpropagation with diagnostics=figure6, and several k, and collect the rows"
        )
        return None
    path = results.folder / "tables" / "signals.md"
    path.write_text(page(pd.concat(found, ignore_index=True)))
    return path


def jobs(results: Results) -> Jobs:
    return {"signals": partial(write, results)}
