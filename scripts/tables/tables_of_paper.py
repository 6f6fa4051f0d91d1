"""The paper's Tables 2, 3 and 6: its values, ours and the ratio, as Markdown and LaTeX.

Table 2 comes from the rows. Tables 3 and 6 come from every results/bench_rnn*.json that has the
paper's shapes (scripts/bench_rnn.py --parts paper), a table per device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from scripts.evidence.every_source import Jobs, Results
from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.rows import METRICS, Row, mean_and_deviation, metric_of
from scripts.evidence.shown import Shown, is_reduced, shown_rows, stands_in, what_ran
from scripts.evidence.table import Table, write_page
from scripts.tables.bench_table import readable_records
from scripts.tables.tables_of_setups import spread

NOT_RUN, NOT_MEASURED, NOT_RECORDED, NOT_PRINTED = (
    "not yet run",
    "not measured",
    "not recorded",
    "-",
)
PAPERS_DEVICE = (
    "Paper: one A100-class GPU, a training step of the whole network of batch 128, "
    "against a loop over cells."
)
BENCHMARK = "python scripts/bench_rnn.py --parts paper --out results/bench_rnn_paper.json"
METHODS = {"fixed_point": ("FPI", "fp"), "highway": ("Highway", "k")}


def models_table(chosen: list[Shown]) -> Table:
    """Table 2: the nine networks and their sizes."""
    rows = []
    for shown in chosen:
        paper = shown.paper
        n = shown.rows[0]["parameters"] if shown.rows else None
        rows.append(
            [
                paper.dataset,
                paper.model,
                str(paper.L),
                recorded(shown, "L", str),
                in_short(paper.parameters),
                recorded(shown, "parameters", in_short),
                ratio(n, paper.parameters),
                "yes" if paper.intermediate_losses else "no",
                "; ".join(what_ran(shown)) or f"{NOT_RUN}: {paper.command}",
            ]
        )
    return Table(
        (
            "dataset",
            "model",
            "L, paper",
            "L, here",
            "parameters, paper",
            "parameters, here",
            "ratio",
            "losses in between",
            "runs here",
        ),
        rows,
        "Networks",
    )


def recorded(shown: Shown, name: str, form) -> str:
    """A field of the rows in words, or why there is none."""
    if not shown.rows:
        return NOT_RUN
    value = shown.rows[0][name]
    return NOT_RECORDED if value is None else form(value)


def in_short(n: int) -> str:
    """For instance 29.8k or 1.73M."""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def ratio(ours: float | None, papers: float | None) -> str:
    return "-" if ours is None or papers is None else f"{ours / papers:.2f}"


def scores_table(chosen: list[Shown]) -> Table:
    """Table 2: final scores of BP, and of Highway-BP at the largest k that both have."""
    rows = []
    for shown in chosen:
        k, exact = compared_k(shown), shown.of("bp")
        ours, papers = shown.of("highway", k), shown.paper.published.get("highway", {})
        rows.append(
            [
                shown.paper.title,
                METRICS[shown.paper.metric].label,
                *side_by_side(exact, shown.paper.published.get("bp")),
                NOT_PRINTED if k is None else in_words(k, shown),
                *side_by_side(ours, papers.get(k)),
                difference(ours, exact),
                state(shown),
            ]
        )
    return Table(
        (
            "experiment",
            "score",
            "BP, paper",
            "BP, here",
            "ratio",
            "k",
            "Highway, paper",
            "Highway, here",
            "ratio",
            "here, Highway less BP",
            "runs here",
        ),
        rows,
        "Final scores",
        "Ratios of reduced runs and stand-ins compare other trainings: what they say of the method "
        "is the difference to backpropagation in the same column of runs.",
    )


def compared_k(shown: Shown) -> int | None:
    """The largest k that both have, else the largest of ours, else of the paper."""
    ours = {row["k"] for row in shown.main() if row["grad"] == "highway"}
    papers = set(shown.paper.published.get("highway", {}))
    return max(ours & papers or ours or papers, default=None)


def in_words(k: int, shown: Shown) -> str:
    return f"{k} (gamma={shown.gamma()})" if shown.gamma() else str(k)


def side_by_side(rows: list[Row], papers: float | None) -> list[str]:
    """The paper's score, ours, and the ratio."""
    mean = mean_and_deviation(rows)[0] if rows else None
    return [
        NOT_PRINTED if papers is None else f"{papers:g}",
        spread(rows) if rows else NOT_RUN,
        ratio(mean, papers),
    ]


def difference(rows: list[Row], exact: list[Row]) -> str:
    if not rows or not exact:
        return "-"
    gap = mean_and_deviation(rows)[0] - mean_and_deviation(exact)[0]
    return f"{gap:+.{metric_of(rows).digits}f}"


def state(shown: Shown) -> str:
    """Whether the rows are the paper's experiment in full, or what they are instead."""
    if not shown.rows:
        return NOT_RUN
    first = shown.rows[0]
    parts = [
        name
        for name, is_so in (
            ("stand-in", stands_in(shown.paper, first)),
            ("reduced", is_reduced(shown.paper, first)),
        )
        if is_so
    ]
    return "complete" if shown.complete else ", ".join(parts) or "other settings"


def write_table2(results: Results) -> Path:
    chosen = list(shown_rows(results).values())
    devices = sorted({row["device"] for shown in chosen for row in shown.rows})
    return write_page(
        results.folder / "tables" / "table2.md",
        "Table 2: networks and final scores",
        [
            f"Paper: one A100-class GPU. Here: {', '.join(devices) or NOT_RUN}. Scores are means "
            "over seeds, with their standard deviation; a single seed has none. A dash: the paper "
            "prints no value, or there is none to compare.",
            sources(chosen),
        ],
        [models_table(chosen), scores_table(chosen)],
    )


def sources(chosen: list[Shown]) -> str:
    parts = [
        f"{shown.paper.title}: {shown.paper.published['source']}"
        for shown in chosen
        if shown.paper.published
    ]
    return f"Where the paper's scores come from: {'. '.join(parts)}."


def recurrent() -> list[PaperRow]:
    """The networks of Tables 3 and 6."""
    return [paper for paper in paper_rows().values() if paper.milliseconds]


def speedups_table(times: Mapping[str, dict], device: str) -> Table:
    """Table 3: times faster than backpropagation, ours also beside torch.nn's own layers."""
    rows = []
    for paper in recurrent():
        found = times.get(paper.key, {})
        ms, over_nn = found.get("ms", {}), found.get("speedup", {})
        for k, papers in paper.speedup.items():
            known = "loop" in ms and f"k{k}" in ms
            ours = ms["loop"] / ms[f"k{k}"] if known else None
            rows.append(
                [
                    paper.title,
                    str(k),
                    f"{papers:.1f}",
                    measured(ours),
                    ratio(ours, papers),
                    measured(over_nn.get(f"k{k}")),
                ]
            )
    return Table(
        ("network", "k", "over a loop, paper", "over a loop, here", "ratio", "over torch.nn, here"),
        rows,
        f"Here: {device}",
    )


def measured(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def milliseconds_table(times: Mapping[str, dict], device: str) -> Table:
    """Table 6: milliseconds per step, a line each for the paper, here, and the ratio."""
    ks = list(recurrent()[0].milliseconds["highway"])
    rows = []
    for paper in recurrent():
        ms = times.get(paper.key, {}).get("ms", {})
        for method, (name, prefix) in METHODS.items():
            papers = [paper.milliseconds["bp"], None, *(paper.milliseconds[method][k] for k in ks)]
            ours = [ms.get("loop"), ms.get("nn"), *(ms.get(f"{prefix}{k}") for k in ks)]
            head = [paper.title, name]
            rows += [
                [*head, "paper", *("-" if value is None else str(value) for value in papers)],
                [*head, "here", *(measured(value, 0) for value in ours)],
                [*head, "ratio", *map(ratio, ours, papers)],
            ]
    return Table(
        ("network", "method", "ms per step", "BP, loop", "BP, torch.nn", *(f"k={k}" for k in ks)),
        rows,
        f"Here: {device}",
    )


def write_timing(name: str, title: str, table, results: Results) -> Path:
    """A page with a table per device that the paper's shapes were measured on."""
    records = [record for record in readable_records(results.folder) if record.get("paper")]
    tables = [
        table({found.get("row"): found for found in record["paper"]}, described(record))
        for record in records
    ]
    return write_page(
        results.folder / "tables" / f"{name}.md",
        title,
        [
            f"{PAPERS_DEVICE} Here: the device named with each table, forward and backward "
            "through the recurrent layers alone, against a loop over cells and against nn.GRU or "
            "nn.LSTM. A ratio is ours by the paper's; where times are of two devices it compares "
            "devices as well.",
        ],
        tables or [table({}, f"{NOT_MEASURED}; {BENCHMARK}")],
    )


def described(record: dict) -> str:
    where = record["environment"]
    return (
        f"{where['device']}, torch {where['torch']}, commit {where['commit'][:7]}, median of "
        f"{record['repeats']}"
    )


def jobs(results: Results) -> Jobs:
    return {
        "table2": partial(write_table2, results),
        "table3": partial(
            write_timing,
            "table3",
            "Table 3: times faster than backpropagation",
            speedups_table,
            results,
        ),
        "table6": partial(
            write_timing,
            "table6",
            "Table 6: milliseconds per training step",
            milliseconds_table,
            results,
        ),
    }
