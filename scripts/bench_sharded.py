"""Measure training steps of layers spread over processes: Highway-BP beside what torch offers.

    python scripts/bench_sharded.py --processes 1 2 4 --out results/bench_sharded.json

A transformer of 24 sublayers, gloo, one thread per process. Strategies take turns in the same
processes: Highway-BP and backpropagation through a `ShardedChain`, its batch whole and in
micro-batches; torch's pipelines (model parallelism, which is GPipe with one micro-batch, GPipe,
1F1B); torch's DistributedDataParallel. Those that claim to be exact first have to find the
gradients of one process; otherwise nothing is timed. Times run from a barrier to the moment when
the last process is done. `costs`, measured between the steps, are what the performance model of
scripts/figures/scaling.py knows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from experiments.errors import UserError
from experiments.provenance import environment
from scripts.program import run
from scripts.sharding.costs import Costs
from scripts.sharding.equivalence import TOLERANCE, gradient_errors
from scripts.sharding.setting import Setting
from scripts.sharding.strategies import Strategy, strategies
from scripts.timing import Seconds, medians

Build = Callable[[Setting], dict[str, Strategy]]


def timed(strategy: Strategy) -> dict[str, float]:
    """Seconds of a step until all processes have done it, and of its passes where it has two."""
    strategy.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    between = strategy.step()
    dist.barrier()
    end = time.perf_counter()
    passes = {} if between is None else {"forward": between - start, "backward": end - between}
    return passes | {"step": end - start}


def steps_in_turn(ways: Mapping[str, Strategy]) -> dict[str, float]:
    return {
        f"{name}_{part}": value for name, way in ways.items() for part, value in timed(way).items()
    }


def process(
    rank: int, processes: int, setting: Setting, repeats: int, build: Build, meet: str
) -> None:
    """One of them: compare gradients, then measure; the first writes down what was found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}/meet", rank=rank, world_size=processes
    )
    ways = build(setting)
    errors, rounds = gradient_errors(ways, setting), []
    if not beyond(errors):
        costs = Costs(setting)
        rounds = [(steps_in_turn(ways), costs.take_turn()) for _ in range(repeats + 1)]
    if rank == 0:
        (Path(meet) / "found.json").write_text(json.dumps([errors, rounds]))
    dist.barrier()
    os._exit(0)  # gloo's teardown was seen to abort now and then


def on_processes(processes: int, setting: Setting, repeats: int, build: Build) -> dict:
    """The record of so many processes.

    Raises:
        UserError: a strategy that claims to be exact is not.
    """
    with tempfile.TemporaryDirectory() as meet:
        mp.spawn(process, (processes, setting, repeats, build, meet), nprocs=processes)
        errors, rounds = json.loads((Path(meet) / "found.json").read_text())
    if beyond(errors):
        wrong = ", ".join(f"{name} ({errors[name]:.2g})" for name in beyond(errors))
        raise UserError(
            f"on {processes} processes gradients differ from those of one by more than "
            f"{TOLERANCE:g} of the largest: {wrong}; nothing was timed"
        )
    steps, costs = (together(turns[1:]) for turns in zip(*rounds, strict=True))  # after a warm-up
    return {
        "oversubscribed": processes > cores(),
        "gradient_error": errors,
        "seconds": medians(steps),
        "costs": medians(costs),
        "backward_over_bp": ratios(steps, "_backward", "bp_backward"),
        "step_over_model_parallel": ratios(steps, "_step", "model_parallel_step"),
    }


def beyond(errors: Mapping[str, float]) -> list[str]:
    """The strategies whose gradient is wrong."""
    return [name for name, error in errors.items() if error > TOLERANCE]


def together(rounds: Sequence[Mapping[str, float]]) -> Seconds:
    return {name: [seconds[name] for seconds in rounds] for name in rounds[0]}


def ratios(times: Seconds, part: str, base: str) -> dict[str, float]:
    """Medians of the repetitions' ratios, by strategy."""
    return {
        name.removesuffix(part): statistics.median(
            a / b for a, b in zip(values, times[base], strict=True)
        )
        for name, values in times.items()
        if name.endswith(part)
    }


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main(argv: Sequence[str], build: Build = strategies) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    args = parser.parse_args(argv)
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
    for processes in args.processes:
        setting.check(processes)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before anything is measured
    torch.set_num_threads(1)  # as in the processes; the record tells
    record: dict = {
        "environment": environment(torch.device("cpu")),
        "cores": cores(),
        "repeats": args.repeats,
        **asdict(setting),
        "state_bytes": setting.state_bytes,
        "weight_bytes": setting.weight_bytes,
        "processes": {},
    }
    for processes in args.processes:
        found = on_processes(processes, setting, args.repeats, build)
        record["processes"][processes] = found
        print(
            processes,
            {n: round(s, 4) for n, s in found["seconds"].items() if "step" in n},
            {n: round(r, 3) for n, r in found["step_over_model_parallel"].items()},
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
