"""What all benchmarks share: times, ratios, peak memory, arguments and records.

Times are medians of interleaved repetitions in one process, after a warm-up, synchronised on CUDA.
A ratio is the median of the ratios within each repetition, so that the machine's drift cancels.
Peak memory of tensors is the memory that a step adds to the tensors that existed before.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

import highway_bp as hb
from experiments.errors import UserError
from experiments.files import write_text
from experiments.provenance import environment
from scripts.program import at_least_one

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(description: str, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with --out and --repeats."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--repeats", type=at_least_one, default=repeats)
    return parser


def new_record(**settings: Any) -> dict[str, Any]:
    """A record with commit, device, versions and ``settings``."""
    return {"environment": environment(DEVICE), **settings}


def save(record: Mapping[str, Any], out: Path | None) -> None:
    if out:
        write_text(out, json.dumps(record, indent=1) + "\n")


def method_of(name: str, gamma: float | str = 0.0) -> hb.Method:
    """The method named "bp", "fp3", "bptt16", "k3", "k3g0.2" (gamma), or "k1w16" (windows of 16).

    ``gamma``: for Highway-BP (k3) if its name has none.
    """
    if name == "bp":
        return hb.Backprop()
    if found := re.fullmatch(r"fp(\d+)", name):
        return hb.FixedPoint(int(found[1]))
    if found := re.fullmatch(r"bptt(\d+)", name):
        return hb.TruncatedBPTT(int(found[1]))
    if found := re.fullmatch(r"k(\d+)(?:g([\d.]+))?(?:w(\d+))?", name):
        k, own, window = found.groups()
        return hb.Highway(int(k), gamma if own is None else float(own), int(window or 1))
    raise UserError(f"{name}; expected bp, or a name such as k3, k3g0.2, k1w16, fp3, bptt16")


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(runs: Mapping[str, Callable[[], float]], repeats: int) -> pd.DataFrame:
    """Seconds, a column per run and a line per repetition, without the warm-up."""
    rounds = [{name: run() for name, run in runs.items()} for _ in range(repeats + 1)]
    return pd.DataFrame(rounds[1:])


def times(
    runs: Mapping[str, Callable[[], float]], repeats: int, ratios: Mapping[str, str]
) -> dict[str, dict]:
    """`medians` of interleaved runs, and median ratios: formulas of the runs' names."""
    seconds = interleaved(runs, repeats)
    return {
        **medians(seconds),
        "ratios": {n: float(seconds.eval(formula).median()) for n, formula in ratios.items()},
    }


def medians(seconds: pd.DataFrame) -> dict[str, dict]:
    """The median of every column; its spread, the least and the most."""
    spread = seconds.agg(["min", "max"]).to_dict("list")
    return {"seconds": seconds.median().to_dict(), "spread": spread}


def show(title: str, values: Mapping[str, float]) -> None:
    print(title)
    for name, value in values.items():
        print(f"  {name:45} {value:9.4f}", flush=True)


def in_a_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Return what a module-level function returns in a new Python process.

    The profiler mistakes memory that an earlier profile has seen.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def tensor_peak(step: Callable[[], object]) -> int:
    """Peak bytes of tensors in ``step`` above those before it; ``step`` first runs to warm up."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [
        (e.start_ns(), e.nbytes())
        for e in profiler.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return max(accumulate(size for _, size in sorted(events, key=itemgetter(0))))
