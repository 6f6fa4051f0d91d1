"""Steps that scripts/bench_sharded.py measured, beside what the performance model says of them."""

from __future__ import annotations

from math import inf

from experiments.errors import UserError
from scripts.scaling_model import (
    Link,
    Network,
    data_parallel,
    highway,
    model_parallel,
    pipeline,
    sharded_backprop,
)

PASSES = ("forward", "inputs", "backward")
NEAR = 0.1  # of the measured time
NAMES = {
    "model_parallel": "model parallel",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "data_parallel": "data parallel",
    "bp": "sharded backpropagation",
}


def check(record: dict) -> None:
    """Raise UserError for a record that lacks what a prediction needs."""
    if not all("costs" in found for found in record.get("processes", {"": {}}).values()):
        raise UserError(
            "the record has no costs of layers and messages for each number of "
            "processes; scripts/bench_sharded.py makes one that has"
        )


def predictions(record: dict, P: int) -> dict[str, float]:
    """Seconds of a step on P processes, by the record's names, from costs alone."""
    costs, M = record["processes"][str(P)]["costs"], record["micro_batches"]
    link, cores = _link(record, costs), P * costs["alone"] / costs["together"]
    whole, micro = _network(record, costs, "whole"), _network(record, costs, "micro")
    share = _network(record, costs, "share", times=P)
    in_turns = pipeline(micro, P, link, M, cores)
    found = {
        "model_parallel": model_parallel(whole, P, link),
        "gpipe": in_turns,
        "1f1b": in_turns,
        "data_parallel": data_parallel(share, P, link, cores),
    }
    for net, parts, suffix in ((whole, 1, ""), (micro, M, "_micro")):
        found[f"bp{suffix}"] = sharded_backprop(net, P, link, parts, cores)
        for k in range(P):
            found[f"k{k}{suffix}"] = highway(net, P, link, k, parts, cores)
    return found


def _network(record: dict, costs: dict[str, float], cut: str, times: int = 1) -> Network:
    """By what was measured on a cut, ``times`` of which are the whole batch."""
    forward, inputs, backward = (times * costs[f"{cut}_{name}"] for name in PASSES)
    return Network(
        L=record["layers"],
        forward=forward,
        inputs=inputs,
        parameters=backward - inputs,
        state=record["state_bytes"],
        weights=record["weight_bytes"],
        batch=record["batch"],
    )


def _link(record: dict, costs: dict[str, float]) -> Link:
    """From messages of one token's state and of the whole; one process sends none."""
    wait, whole = costs.get("exchange_one", 0.0), costs.get("exchange", 0.0)
    return Link(wait, record["state_bytes"] / (whole - wait) if whole > wait else inf)


def validation(record: dict) -> list[tuple[str, float, float]]:
    """(configuration, measured seconds, predicted seconds) of a step."""
    rows = []
    for P, found in record["processes"].items():
        where = f"{P} process{'' if P == '1' else 'es'}"
        where += " (oversubscribed)" if found["oversubscribed"] else ""
        for name, predicted in predictions(record, int(P)).items():
            measured = found["seconds"].get(f"{name}_step")
            if measured is not None:
                rows.append((f"{where}, {called(name)}", measured, predicted))
    return rows


def called(name: str) -> str:
    """A strategy of the record in a reader's words."""
    name, cut, _ = name.partition("_micro")
    words = NAMES.get(name) or f"Highway k={name[1:]}"
    return f"{words}, micro-batches" if cut else words


def measured_part(record: dict) -> list[str]:
    """Lines of the page."""
    env, rows = record["environment"], validation(record)
    near = sum(abs(predicted / measured - 1) <= NEAR for _, measured, predicted in rows)
    return [
        "## Measured and predicted",
        "",
        f"Seconds of a step of {record['layers']} sublayers of width {record['width']}, "
        f"{record['batch']} x {record['length']} tokens, whole or in {record['micro_batches']} "
        f"micro-batches; {env['device']} per process on {record['cores']} cores, torch "
        f"{env['torch']}, commit {env['commit'][:7]}. Before it was timed, every strategy but "
        "Highway-BP below k = P - 1 was seen to find the gradients of one process. The model "
        "knows the cost of a layer (on the whole batch, in micro-batches, on a process's share), "
        "of a message, and how much longer a step takes in all processes at once than in one "
        "(oversubscribed: there are too few cores). "
        f"{near} of {len(rows)} predictions are within {NEAR:.0%}.",
        "",
        "| | measured | predicted | predicted / measured |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {measured:.3f} | {predicted:.3f} | {predicted / measured:.2f} |"
            for name, measured, predicted in rows
        ),
        "",
        "## Who is ahead, measured",
        "",
        "The fastest exact strategy, then Highway-BP at k = 0 and k = 1, in micro-batches or not, "
        "whichever takes less: seconds, and how many times as fast it is, **ahead** above 1.",
        "",
        "| processes | exact | k = 0 | k = 1 |",
        "|---:|---|---|---|",
        *(who_is_ahead(P, found["seconds"]) for P, found in record["processes"].items()),
    ]


def who_is_ahead(P: str, seconds: dict[str, float]) -> str:
    """A line of the table of measured steps."""
    (exact, least), *ours = fastest(seconds)
    cells = [P, f"{called(exact)}: {least:.3f}"]
    for best in ours:
        cells.append(
            "-" if best is None else f"{called(best[0])}: {best[1]:.3f}, {marked(least / best[1])}"
        )
    return f"| {' | '.join(cells)} |"


def fastest(seconds: dict[str, float]) -> list[tuple[str, float] | None]:
    """(name, seconds of a step) of the fastest exact strategy, of Highway-BP at k = 0, at 1."""
    steps = {name.removesuffix("_step"): s for name, s in seconds.items() if name.endswith("_step")}
    kinds = [[name for name in steps if name[0] != "k"], ["k0", "k0_micro"], ["k1", "k1_micro"]]
    known = [[(name, steps[name]) for name in names if name in steps] for names in kinds]
    return [min(found, key=lambda way: way[1], default=None) for found in known]


def marked(ratio: float) -> str:
    """Bold where it is a win."""
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"
