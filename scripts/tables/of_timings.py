"""Tables of results/bench_rnn*.json: the paper's Tables 3 and 6, and other measurements.

Tables 3 and 6 come from every record with the paper's shapes (scripts/bench_rnn.py --parts paper),
a table per device. The page bench_rnn has other shapes of recurrent layers beside torch.nn's.
"""

from collections.abc import Callable, Mapping

from scripts.evidence.paper import paper_rows
from scripts.evidence.results import Results
from scripts.tables.table import Page, Table, number

PAPER_NOTE = (
    "Paper: one A100-class GPU, a training step of the whole network, batch 128. Here: forward and "
    "backward through the recurrent layers alone, against a loop over cells and against nn.GRU or "
    "nn.LSTM (cuDNN on a GPU), whose forward pass Highway-BP and FPI use. Gradients are those of "
    "the weights, not of the input. On pixels, FPI at k = 0 was timed behind the loop, which "
    "slowed it down. Tables of different commits do not compare precisions."
)
RNN_NOTE = (
    "Forward and backward, times faster than `nn.GRU` or `nn.LSTM` in the same process, with all "
    "threads (nn) or one (nn1), whichever is faster; bold where torch.nn is faster. kN is "
    "Highway-BP with k = N, kNwS with windows of S steps, fpN the fixed point, bpttS truncated "
    "BPTT."
)
RNN_PARTS = {
    "small": "Long sequences of small steps",
    "grid": "Where it pays, and where plain BPTT wins",
}
BASELINES = ("nn", "nn1")  # torch's own layer: with all threads, with one
METHODS = {"fixed_point": ("FPI", "fp"), "highway": ("Highway", "k")}
Lines = list[dict[str, str]]


def of_paper(title: str, lines: Callable[[Mapping[str, dict]], Lines], results: Results) -> Page:
    """A page with a table per device that the paper's shapes were measured on, GPUs first.

    Without any measurement it has the paper's numbers alone.
    """
    records = [r for r in results.records("bench_rnn*.json").values() if r.get("paper")]
    records.sort(key=lambda r: ("CPU" in r["environment"]["device"], bool(r.get("tf32"))))
    found = {f"Here: {described(r)}": {s["row"]: s for s in r["paper"]} for r in records}
    if not found:
        found = {"Here: not measured": {key: {"ms": {}, "speedup": {}} for key in paper_rows()}}
    tables = [Table(measured(lines(shapes)), heading) for heading, shapes in found.items()]
    return Page(title, [PAPER_NOTE], tables, latex=True)


def measured(lines: Lines) -> Lines:
    """Drop the columns that are empty."""
    kept = [name for name in lines[0] if any(line[name] != "-" for line in lines)]
    return [{name: line[name] for name in kept} for line in lines]


def speedups(shapes: Mapping[str, dict]) -> Lines:
    """Table 3: times faster than backpropagation, ours also beside torch.nn's own layers."""
    lines = []
    for key, shape in shapes.items():
        paper = paper_rows()[key]
        for k, printed in paper.speedup.items():
            loop, ms = (shape["ms"].get(name) for name in ("loop", f"k{k}"))
            ours = loop / ms if loop and ms else None
            lines.append(
                {
                    "network": paper.title,
                    "k": str(k),
                    "over a loop, paper": f"{printed:.1f}",
                    "over a loop, here": number(ours, 2),
                    "over torch.nn, here": number(shape["speedup"].get(f"k{k}"), 2),
                }
            )
    return lines


def milliseconds(shapes: Mapping[str, dict]) -> Lines:
    """Table 6: milliseconds per step, a line for the paper and one for ours if it was measured."""
    lines = []
    for key, ms in ((key, shape["ms"]) for key, shape in shapes.items()):
        paper = paper_rows()[key]
        for method, (name, prefix) in METHODS.items() if paper.milliseconds else ():
            printed = {f"{prefix}{k}": value for k, value in paper.milliseconds[method].items()}
            printed = {"loop": paper.milliseconds["bp"], "nn": "-", **printed}
            ours = {arm: number(ms.get(arm), 1) for arm in printed}
            heads = ("BP, loop", "BP, torch.nn", *(f"k={k}" for k in paper.milliseconds[method]))
            if ms and not any(arm.startswith(prefix) for arm in ms):
                continue
            both = {"paper": printed, "here": ours} if ms else {"paper": printed}
            for where, values in both.items():
                about = {"network": paper.title, "method": name, "ms per step": where}
                lines.append(about | dict(zip(heads, map(str, values.values()), strict=True)))
    return lines


def described(record: dict) -> str:
    where = record["environment"]
    precision = "TF32" if record.get("tf32") else "float32"
    processes = f" in each of {n} processes" if (n := record.get("processes")) else ""
    return (
        f"{where['device']}, {precision}, torch {where['torch']}, commit {where['commit'][:10]}, "
        f"median of {record['repeats']}{processes}"
    )


def bench_rnn(results: Results) -> Page | None:
    """The page of the record bench_rnn.json; None without it."""
    record = results.record("bench_rnn")
    if record is None:
        return None
    tables = [
        Table([speeds(shape) for shape in record[part]], heading)
        for part, heading in RNN_PARTS.items()
        if record.get(part)
    ]
    if record.get("memory"):
        peaks = [memory(shape) for shape in record["memory"]]
        tables.append(Table(peaks, "Peak memory of a step, MB of tensors"))
    notes = [RNN_NOTE, f"On {described(record)}."]
    return Page("Recurrent layers beside torch.nn's", notes, tables)


def speeds(shape: dict) -> dict[str, str]:
    plain = {f"{name}, ms": spread(shape, name) for name in BASELINES if name in shape["ms"]}
    ratios = {name: value for name, value in shape["speedup"].items() if name not in BASELINES}
    bold = {n: f"{r:.2f}" if r >= 1 else f"**{r:.2f}**" for n, r in ratios.items()}
    return {"shape": shape["shape"], **plain, **bold}


def spread(shape: dict, name: str) -> str:
    """The median time, with the least and the most where the record has them."""
    ends = [f"{shape[key][name]:.1f}" for key in ("least_ms", "most_ms") if key in shape]
    return f"{shape['ms'][name]:.1f}" + (f" ({' to '.join(ends)})" if ends else "")


def memory(shape: dict) -> dict[str, str]:
    peaks = {name: f"{peak['tensors_mb']:.0f}" for name, peak in shape["peak"].items()}
    return {"shape": shape["shape"], **peaks}
