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
from torch import Tensor, nn

from experiments.errors import UserError
from experiments.provenance import environment
from scripts.benchmark import arguments, save
from scripts.program import run
from scripts.sharded_strategies import Setting, Strategy, loss_of, named, strategies

Build = Callable[[Setting], dict[str, Strategy]]
SETTING = Setting()
TOLERANCE = 1e-3  # largest gradient error: float32, sums in another order
TURNS = 10  # round trips in one measurement of a message


def gradient_errors(ways: Mapping[str, Strategy], setting: Setting) -> dict[str, float]:
    """The worst `gradient_error` of every exact strategy over all processes."""
    layers = setting.build()
    loss_of(nn.Sequential(*layers)(setting.input())).backward()
    expected = {name: p.grad for name, p in named(layers, range(len(layers))).items()}
    exact = {name: way for name, way in ways.items() if way.exact}
    errors = torch.stack([gradient_error(way, expected) for way in exact.values()])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return dict(zip(exact, errors.tolist(), strict=True))


def gradient_error(way: Strategy, expected: Mapping[str, Tensor]) -> Tensor:
    """The worst error of a parameter's gradient in a step, its largest difference over the largest
    expected entry; infinite if a gradient is missing or has nan."""
    way.zero_grad()
    way.step()
    errors = [torch.tensor(0.0)]
    for name, p in way.parameters.items():
        grad = torch.full_like(p, torch.nan) if p.grad is None else p.grad
        errors.append((grad - expected[name]).abs().max() / expected[name].abs().max())
    return torch.stack(errors).nan_to_num(nan=torch.inf).max()


def steps_in_turn(ways: Mapping[str, Strategy]) -> dict[str, float]:
    """Seconds until all processes finish a step of each strategy; also of its two passes if they
    are separate."""
    seconds = {}
    for name, way in ways.items():
        way.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        between = way.step()
        dist.barrier()
        end = time.perf_counter()
        seconds[f"{name}_step"] = end - start
        if between is not None:
            seconds |= {f"{name}_forward": between - start, f"{name}_backward": end - between}
    return seconds


def costs(layers: Sequence[nn.Module], x: Tensor) -> dict[str, float]:
    """Seconds of an average layer's passes on rank 0 alone, and of a message of ``x``."""
    found = passes(layers, x) if dist.get_rank() == 0 else {}
    return found | ({"exchange": exchange(x)} if dist.get_world_size() > 1 else {})


def passes(layers: Sequence[nn.Module], x: Tensor) -> dict[str, float]:
    """Seconds of an average layer: forward, w J alone, the whole backward pass."""
    start, runs = time.perf_counter(), []
    for layer in layers:
        h = x.detach().requires_grad_()
        x = layer(h)
        runs.append((x, [h, *layer.parameters()], torch.ones_like(x)))
    found = {"whole_forward": time.perf_counter() - start}
    for name, count in (("whole_inputs", 1), ("whole_backward", None)):
        start = time.perf_counter()
        for out, leaves, w in reversed(runs):
            torch.autograd.grad(out, leaves[:count], w, retain_graph=count == 1)
        found[name] = time.perf_counter() - start
    return {name: seconds / len(layers) for name, seconds in found.items()}


def exchange(x: Tensor) -> float:
    """Seconds of one message of ``x`` between ranks 0 and 1, while the others wait."""
    rank, received = dist.get_rank(), torch.empty_like(x)
    dist.barrier()
    start = time.perf_counter()
    for turn in range(2 * TURNS if rank < 2 else 0):
        if turn % 2 == rank:
            dist.send(x, 1 - rank)
        else:
            dist.recv(received, 1 - rank)
    seconds = (time.perf_counter() - start) / (2 * TURNS)
    dist.barrier()
    return seconds


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
        layers, x = setting.build(), setting.input()
        rounds = [(steps_in_turn(ways), costs(layers, x)) for _ in range(repeats + 1)]
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
    backward = steps.filter(regex="_backward$").rename(columns=lambda n: n.split("_back")[0])
    return {
        "gradient_error": errors,
        "seconds": steps.median().to_dict(),
        "costs": costs.median().to_dict(),
        "backward_over_bp": backward.div(backward["bp"], axis=0).median().to_dict(),
    }


def main(argv: Sequence[str], setting: Setting = SETTING, build: Build = strategies) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2, 4), default=[1, 2, 4])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in the processes; the record names this number
    x, weights = setting.input(), nn.Sequential(*setting.build()).parameters()
    record = {
        "environment": environment(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": args.repeats,
        **asdict(setting),
        "state_bytes": x.nbytes,
        "weight_bytes": sum(p.nbytes for p in weights) / setting.layers,
        "processes": {},
    }
    for processes in args.processes:
        found = on_processes(processes, setting, args.repeats, build)
        record["processes"][processes] = found
        steps = {n: round(s, 4) for n, s in found["seconds"].items() if n.endswith("_step")}
        print(processes, steps, flush=True)
        save(record, args.out)


if __name__ == "__main__":
    run(main)
