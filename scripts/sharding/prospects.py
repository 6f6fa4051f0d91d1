"""Transformers on many GPUs, as the performance model sees them: predictions, no measurements."""

from __future__ import annotations

from collections.abc import Iterable

from scripts.scaling_model import (
    STRATEGIES,
    Link,
    Network,
    data_parallel,
    replicated,
    transformer,
)
from scripts.sharding.validation import marked

H100 = 0.4 * 989e12  # bfloat16 operations per second, of which 40 % are commonly reached
NVLINK, INFINIBAND = Link(5e-6, 450e9), Link(10e-6, 50e9)  # one direction, published
GPUS_PER_NODE = 8
MODELS = {  # layers, width, length; L of Highway-BP counts sublayers, a stage has whole layers here
    "the paper's GPT-2 (12 layers, width 256)": (12, 256, 256),
    "RoBERTa-base (12 layers, width 768)": (12, 768, 128),
    "7B decoder (32 layers, width 4096)": (32, 4096, 4096),
    "70B decoder (80 layers, width 8192)": (80, 8192, 4096),
}
BATCHES = (8, 1024)  # sequences
EXACT = {
    "data parallel": "DP",
    "GPipe, 1F1B": "PP",
    "zero bubble (ZB-H1)": "ZB",
    "model parallel": "MP",
}
AHEAD = (
    "The fastest exact strategy ("
    + "; ".join(f"{short}: {name}" for name, short in EXACT.items())
    + "), then how many times as fast Highway-BP is, whose gradient is approximate, at k = 0 and "
    "at k = 1, its batch in micro-batches or in one piece, whichever takes less: **ahead** above 1."
)


def networks() -> dict[tuple[str, int], Network]:
    """By title and batch."""
    return {
        (title, batch): transformer(*shape, batch, H100)
        for title, shape in MODELS.items()
        for batch in BATCHES
    }


def devices(net: Network) -> list[int]:
    return [P for P in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if net.batch * net.L >= P]


def speedups(net: Network, P: int) -> dict[str, float]:
    """Times faster than one device, of the strategies that can use P devices.

    All but data parallelism itself spread layers over 2 devices or more, and have the number of
    replicas that suits them best.
    """
    link = NVLINK if P <= GPUS_PER_NODE else INFINIBAND
    faster = {"data parallel": net.step / data_parallel(net, P, link)} if net.batch >= P else {}
    mixes = [D for D in divisors(P) if net.batch >= D and 2 <= P // D <= net.L]
    for name, seconds in STRATEGIES.items() if mixes else ():
        faster[name] = net.step / min(
            replicated(seconds, net, P, D, link, min(net.batch // D, 4 * P // D)) for D in mixes
        )
    return faster


def divisors(P: int) -> list[int]:
    return [D for D in range(1, P + 1) if P % D == 0]


def table(net: Network) -> list[str]:
    """Lines of the page: a line per strategy, a column per P."""
    found = {P: speedups(net, P) for P in devices(net)}
    lines = _head("P", found)
    for name in ("data parallel", *STRATEGIES):
        cells = [f"{faster[name]:.1f}" if name in faster else "-" for faster in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def who_is_ahead() -> list[str]:
    """Lines of the page: a line per network and batch, a column per P."""
    nets = networks()
    Ps = sorted({P for net in nets.values() for P in devices(net)})
    lines = _head("network, sequences", Ps)
    for (title, batch), net in nets.items():
        cells = [ahead(speedups(net, P)) if P in devices(net) else "" for P in Ps]
        lines.append(f"| {title}, {batch} | " + " | ".join(cells) + " |")
    return lines


def ahead(faster: dict[str, float]) -> str:
    """One cell of it, "DP **1.2** 0.9"; "-" where there are not layers enough for Highway-BP."""
    best = max((name for name in faster if name in EXACT), key=faster.get)
    cells = [EXACT[best]]
    for k in (0, 1):
        speeds = [speed for name, speed in faster.items() if name.startswith(f"Highway k={k}")]
        cells.append(marked(max(speeds) / faster[best]) if speeds else "-")
    return " ".join(cells)


def _head(first: str, Ps: Iterable[int]) -> list[str]:
    cells = [first, *map(str, Ps)]
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
