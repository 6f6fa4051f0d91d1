"""Measure the backward pass of layers spread over processes: Highway-BP beside model parallelism.

    python scripts/bench_sharded.py --processes 2 --out results/bench_sharded.json

A transformer of 24 sublayers; one thread per process. Methods take turns in the same processes;
times run from a barrier to the moment when the last process is done. `exchange` is a message of
one state to the neighbour and back, halved, `exchange_one` one of a single token's state. `costs`
are what scripts/scaling.py predicts from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import highway_bp as hb
from experiments.provenance import environment
from scripts.transformer_layers import sublayers

LAYERS, WIDTH, HEADS = 24, 256, 4
METHODS = {"bp": hb.Backprop(), "k0": hb.Highway(0), "k1": hb.Highway(1)}


def timed(run: Callable[[], object]) -> float:
    """Seconds until all processes have done it."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def step(chain: hb.ShardedChain, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    loss: list[torch.Tensor] = []
    forward = timed(lambda: loss.append(chain(x).square().mean()))
    chain.zero_grad()
    return forward, timed(loss[0].backward)


def exchange(chain: hb.ShardedChain, x: torch.Tensor) -> float:
    """Seconds of one message of a state to a neighbour."""
    ranks, received = chain.ranks, torch.empty_like(x)
    if ranks.size == 1 or ranks.rank > 1:
        return timed(lambda: None)
    other = 1 - ranks.rank

    def there_and_back() -> None:
        for turn in (0, 1):
            sends = ranks.rank == turn
            ranks.exchange([(x, other)] if sends else [], [] if sends else [(received, other)])

    return timed(there_and_back) / 2


def layer_costs(batch: int, length: int, repeats: int) -> dict[str, float]:
    """Seconds of an average layer on one process, for `scripts/scaling.py`."""
    torch.manual_seed(0)
    layers = sublayers(LAYERS, WIDTH, HEADS)
    parameters = [p for layer in layers for p in layer.parameters()]
    found: dict[str, list[float]] = {"forward": [], "inputs": [], "all": []}
    for repeat in range(repeats + 1):
        x = torch.randn(batch, length, WIDTH, requires_grad=True)
        clock = [time.perf_counter()]
        h = x
        for layer in layers:
            h = layer(h)
        clock.append(time.perf_counter())
        torch.autograd.grad(h, x, torch.ones_like(h), retain_graph=True)
        clock.append(time.perf_counter())
        torch.autograd.grad(h, [x, *parameters], torch.ones_like(h))
        clock.append(time.perf_counter())
        if repeat:
            for name, a, b in zip(found, clock, clock[1:], strict=False):
                found[name].append((b - a) / LAYERS)
    forward, inputs, everything = (statistics.median(found[name]) for name in found)
    return {
        "forward": forward, "inputs": inputs, "parameters": everything - inputs,
        "state_bytes": 4 * batch * length * WIDTH,
        "weight_bytes": 4 * sum(p.numel() for p in parameters) / LAYERS,
    }


def measure(rank: int, processes: int, repeats: int, batch: int, length: int, meet: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=rank,
                            world_size=processes)  # fmt: skip
    torch.manual_seed(0)
    chain = hb.ShardedChain(sublayers(LAYERS, WIDTH, HEADS))
    x = torch.randn(batch, length, WIDTH)
    found: dict[str, list[float]] = {"exchange": [], "exchange_one": []}
    for repeat in range(repeats + 1):
        for name, method in METHODS.items():
            if processes == 1 and name == "k1":
                continue
            chain.method = method
            forward, backward = step(chain, x)
            if repeat:  # the first one warms up
                found.setdefault(f"{name}_forward", []).append(forward)
                found.setdefault(f"{name}_backward", []).append(backward)
        seconds, one = exchange(chain, x), exchange(chain, x[:1, :1])
        if repeat:
            found["exchange"].append(seconds)
            found["exchange_one"].append(one)
    if rank == 0:
        (Path(meet) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before anything is measured
    torch.set_num_threads(1)
    record: dict = {"environment": environment(torch.device("cpu")), "repeats": args.repeats,
                    "layers": LAYERS, "width": WIDTH, "batch": args.batch, "length": args.length,
                    "costs": layer_costs(args.batch, args.length, args.repeats),
                    "processes": {}}  # fmt: skip
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as meet:
            mp.spawn(measure, (processes, args.repeats, args.batch, args.length, meet),
                     nprocs=processes)  # fmt: skip
            found = json.loads((Path(meet) / "found.json").read_text())
        ratios = {name: statistics.median(a / b for a, b in zip(
            found[f"{name}_backward"], found["bp_backward"], strict=True))
            for name in METHODS if f"{name}_backward" in found}  # fmt: skip
        record["processes"][processes] = {
            "seconds": {name: statistics.median(values) for name, values in found.items()},
            "backward_over_bp": ratios,
        }
        if processes == 2:
            seconds = record["processes"][processes]["seconds"]
            wait, whole = seconds["exchange_one"], seconds["exchange"]
            size = record["costs"]["state_bytes"]
            record["costs"] |= {"latency": wait, "bandwidth": size / max(whole - wait, 1e-9)}
        print(processes, {n: round(r, 3) for n, r in ratios.items()},
              {n: round(s, 4) for n, s in record["processes"][processes]["seconds"].items()})
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
