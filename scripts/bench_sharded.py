"""Measure training steps of layers spread over processes: Highway-BP beside what torch offers.

    python scripts/bench_sharded.py --processes 1 2 4 --out results/bench_sharded.json

The network is a transformer of 24 sublayers. Processes use gloo and one thread each. The strategies
take turns in the same processes:
- Highway-BP and backpropagation through a `ShardedChain`, with the batch whole and in micro-batches
- torch's model parallelism (GPipe with one micro-batch), GPipe, 1F1B and DistributedDataParallel
Before the timing, the strategies that claim to be exact have to find the gradients of one process;
if one does not, nothing is timed. Times run from a barrier until the last process is done. `costs`
are measured between the steps, for the performance model of scripts/figures/scaling.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from experiments.errors import UserError
from experiments.provenance import environment
from scripts.benchmark import arguments, save
from scripts.program import run
from scripts.sharding.costs import Costs
from scripts.sharding.setting import Setting
from scripts.sharding.strategies import Strategy, gradients_of_one_process, strategies

Build = Callable[[Setting], dict[str, Strategy]]
TOLERANCE = 1e-3  # largest gradient error: float32, sums in another order


def gradient_errors(ways: Mapping[str, Strategy], setting: Setting) -> dict[str, float]:
    """The largest `Strategy.error` of every exact strategy over all processes."""
    exact = {name: way for name, way in ways.items() if way.exact}
    expected = gradients_of_one_process(setting)
    errors = torch.stack([way.error(expected) for way in exact.values()])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return dict(zip(exact, errors.tolist(), strict=True))


def timed(strategy: Strategy) -> dict[str, float]:
    """Seconds until all processes finish a step; also of its two passes if they are separate."""
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
    """Run one process: compare gradients, then measure. Rank 0 writes the result to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}/meet", rank=rank, world_size=processes
    )
    ways = build(setting)
    errors, rounds = gradient_errors(ways, setting), []
    if max(errors.values()) <= TOLERANCE:
        costs = Costs(setting)
        rounds = [(steps_in_turn(ways), costs.take_turn()) for _ in range(repeats + 1)]
    if rank == 0:
        (Path(meet) / "found.json").write_text(json.dumps([errors, rounds]))
    dist.barrier()
    os._exit(0)  # gloo sometimes aborted in its teardown


def on_processes(processes: int, setting: Setting, repeats: int, build: Build) -> dict:
    """Measure on ``processes`` processes and return their record.

    Raises:
        UserError: a strategy that claims to be exact is not.
    """
    with tempfile.TemporaryDirectory() as meet:
        given = (processes, setting, repeats, build, meet)
        mp.start_processes(process, given, processes, start_method="forkserver")
        errors, rounds = json.loads((Path(meet) / "found.json").read_text())
    wrong = [f"{name} ({error:.2g})" for name, error in errors.items() if error > TOLERANCE]
    if wrong:
        raise UserError(
            f"on {processes} processes gradients differ from those of one by more than "
            f"{TOLERANCE:g} of the largest: {', '.join(wrong)}; nothing was timed"
        )
    steps, costs = map(pd.DataFrame, zip(*rounds[1:], strict=True))  # without the warm-up
    return {
        "oversubscribed": processes > cores(),
        "gradient_error": errors,
        "seconds": steps.median().to_dict(),
        "costs": costs.median().to_dict(),
        "backward_over_bp": relative(steps, "_backward", "bp"),
        "step_over_model_parallel": relative(steps, "_step", "model_parallel"),
    }


def relative(seconds: pd.DataFrame, part: str, base: str) -> dict[str, float]:
    """Median ratio of the time of a part of the step to that of ``base``, by strategy."""
    found = seconds.filter(regex=f"{part}$").rename(columns=lambda name: name.removesuffix(part))
    return found.div(found[base], axis=0).median().to_dict()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main(argv: Sequence[str], build: Build = strategies) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args(argv)
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
    for processes in args.processes:
        setting.check(processes)
    torch.set_num_threads(1)  # as in the processes; the record names this number
    record = {
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
        save(record, args.out)


if __name__ == "__main__":
    run(main)
