"""The paper's Tables 2, 3 and 6: its values, ours and the ratio, as Markdown and LaTeX.

Table 2 comes from the rows. Tables 3 and 6 come from every results/bench_rnn*.json that has the
paper's shapes (scripts/bench_rnn.py --parts paper), a table per device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.results_io import Jobs, Results
from scripts.evidence.rows import METRICS, score
from scripts.evidence.settings import Setting
from scripts.tables.table import Table, mean_and_interval, number, ratio, table, write_page

PAPERS_DEVICE = "Paper: one A100-class GPU, a training step of the whole network, batch 128."
METHODS = {"fixed_point": ("FPI", "fp"), "highway": ("Highway", "k")}


def networks(results: Results) -> Table:
    rows = []
    for paper, setting in results.chosen:
        ours = setting.rows[0] if setting else None
        rows.append(
            [
                paper.dataset,
                paper.model,
                str(paper.L),
                str(ours["L"]) if ours else "not run",
                in_short(paper.parameters),
                in_short(ours["parameters"]) if ours else "not run",
                ratio(ours["parameters"] if ours else None, paper.parameters),
                "yes" if paper.intermediate_losses else "no",
                state(setting) if setting else paper.command,
            ]
        )
    columns = ("dataset", "model", "L, paper", "L, here", "parameters, paper", "parameters, here")
    return table((*columns, "ratio", "losses in between", "runs here"), rows, "Networks")


def in_short(n: int) -> str:
    """For instance 29.8k or 1.73M."""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def state(setting: Setting) -> str:
    where = "in full" if setting.full else f"reduced: {setting.preset}"
    return where if setting.learned else f"{where}; not learned"


def final_scores(results: Results) -> Table:
    """BP, and Highway-BP at the largest k that both have, else that we have."""
    rows = []
    for paper, setting in results.chosen:
        papers = paper.published.get("highway", {})
        ours = setting.ks("highway") if setting else []
        k = max(set(ours) & set(papers) or ours or papers, default=None)
        exact = setting.arm("bp") if setting else []
        highway = setting.arm("highway", k) if setting else []
        printed = paper.published.get("bp")
        both = exact and highway and setting.full
        rows.append(
            [
                paper.title,
                METRICS[paper.metric].label,
                "-" if printed is None else f"{printed:g}",
                said(setting, exact),
                "-" if k is None else str(k),
                f"{papers[k]:g}" if k in papers else "-",
                said(setting, highway),
                ratio(mean(highway), papers.get(k)) if both else "-",
                state(setting) if setting else "not run",
            ]
        )
    columns = ("experiment", "score", "BP, paper", "BP, here", "k", "Highway, paper")
    return table(
        (*columns, "Highway, here", "ratio", "runs here"),
        rows,
        "Final scores",
        "Ratios compare runs in full alone; a network that has not learned has no score.",
    )


def said(setting: Setting | None, rows: list) -> str:
    """A network that has not learned has no score."""
    if setting and setting.arm("bp") and not setting.learned:
        return "not learned"
    return mean_and_interval(rows)


def mean(rows: list) -> float:
    return sum(map(score, rows)) / len(rows)


def write_table2(results: Results) -> Path:
    devices = sorted({row["device"] for _, s in results.chosen if s for row in s.rows})
    notes = [
        f"Paper: one A100-class GPU. Here: {', '.join(devices) or 'not run'}. Means over seeds, "
        "with the 95 % interval of the mean from three seeds on. A dash: the paper prints no "
        "value, or there is none to compare.",
        f"Where the paper's scores come from: {sources()}.",
    ]
    path = results.folder / "tables" / "table2.md"
    title = "Table 2: networks and final scores"
    return write_page(path, title, notes, [networks(results), final_scores(results)], latex=True)


def sources() -> str:
    papers = paper_rows().values()
    return ". ".join(f"{p.title}: {p.published['source']}" for p in papers if p.published)


def recurrent() -> list[PaperRow]:
    """The networks of Tables 3 and 6."""
    return [paper for paper in paper_rows().values() if paper.milliseconds]


def speedups(times: Mapping[str, dict], device: str) -> Table:
    """Table 3: times faster than backpropagation, ours also beside torch.nn's own layers."""
    rows = []
    for paper in recurrent():
        found = times.get(paper.key, {})
        ms, over_nn = found.get("ms", {}), found.get("speedup", {})
        for k, papers in paper.speedup.items():
            ours = ms["loop"] / ms[f"k{k}"] if "loop" in ms and f"k{k}" in ms else None
            cells = [number(ours, 2), ratio(ours, papers), number(over_nn.get(f"k{k}"), 2)]
            rows.append([paper.title, str(k), f"{papers:.1f}", *cells])
    columns = ("network", "k", "over a loop, paper", "over a loop, here", "ratio")
    return table((*columns, "over torch.nn, here"), rows, f"Here: {device}")


def milliseconds(times: Mapping[str, dict], device: str) -> Table:
    """Table 6: milliseconds per step, a line each for the paper and here."""
    ks = list(recurrent()[0].milliseconds["highway"])
    rows = []
    for paper in recurrent():
        ms = times.get(paper.key, {}).get("ms", {})
        for method, (name, prefix) in METHODS.items():
            papers = [paper.milliseconds["bp"], "-", *(paper.milliseconds[method][k] for k in ks)]
            ours = [ms.get("loop"), ms.get("nn"), *(ms.get(f"{prefix}{k}") for k in ks)]
            rows += [
                [paper.title, name, "paper", *map(str, papers)],
                [paper.title, name, "here", *(number(value, 1) for value in ours)],
            ]
    heads = ("network", "method", "ms per step", "BP, loop", "BP, torch.nn")
    return table((*heads, *(f"k={k}" for k in ks)), rows, f"Here: {device}")


def write_timing(
    name: str, title: str, make: Callable[[Mapping[str, dict], str], Table], results: Results
) -> Path:
    """A page with a table per device that the paper's shapes were measured on, GPUs first."""
    records = [r for r in results.records("bench_rnn*.json").values() if r.get("paper")]
    records.sort(key=lambda r: ("CPU" in r["environment"]["device"], bool(r.get("tf32"))))
    tables = [make({r["row"]: r for r in one["paper"]}, described(one)) for one in records]
    note = (
        f"{PAPERS_DEVICE} Here: forward and backward through the recurrent layers alone, against "
        "a loop over cells and against nn.GRU or nn.LSTM (cuDNN on a GPU). A ratio is ours by the "
        "paper's; where times are of two devices it compares devices as well."
    )
    path = results.folder / "tables" / f"{name}.md"
    return write_page(path, title, [note], tables or [make({}, "not measured")], latex=True)


def described(record: dict) -> str:
    where = record["environment"]
    precision = "TF32" if record.get("tf32") else "float32"
    return (
        f"{where['device']}, {precision}, torch {where['torch']}, commit {where['commit'][:10]}, "
        f"median of {record['repeats']}"
    )


def jobs(results: Results) -> Jobs:
    three, six = "Table 3: times faster than backpropagation", "Table 6: milliseconds per step"
    return {
        "table2": partial(write_table2, results),
        "table3": partial(write_timing, "table3", three, speedups, results),
        "table6": partial(write_timing, "table6", six, milliseconds, results),
    }
