"""Times and peak memory as the benchmarks take them."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Seconds = dict[str, list[float]]


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], None]) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> Seconds:
    """Seconds of each run in every repetition, after a warm-up."""
    for run in runs.values():
        run()
    rounds = [{name: run() for name, run in runs.items()} for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in runs}


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def tensor_peak(step: Callable[[], object]) -> int:
    """Bytes of tensors at the peak of ``step``, above what there was before; it ran once before."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return _peak_of(profiler)


def _peak_of(profiler: profile) -> int:
    """The largest sum of tensor bytes allocated and not yet freed since the profiler's start."""
    events = [
        (e.start_ns(), e.nbytes())
        for e in profiler.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return max(accumulate(size for _, size in sorted(events, key=itemgetter(0))))


def high_water_mark() -> int:
    """This process's peak resident bytes. (getrusage would give a parent's, if that was larger.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
