"""Measure the seconds of layers and messages, for the performance model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.sharding.setting import Setting, loss_of

TURNS = 10  # round trips in one measurement


class Costs:
    """Measured between the steps of the strategies, so that both meet the same load."""

    def __init__(self, setting: Setting):
        self.layers, self.x = setting.build(), setting.input()
        self.stage = nn.Sequential(*self.layers[: setting.layers // dist.get_world_size()])

    def take_turn(self) -> dict[str, float]:
        """Seconds by name: of an average layer's passes, of a stage's step, of a message."""
        found = {}
        if dist.get_rank() == 0:
            seconds = passes(self.layers, self.x)
            found = {f"whole_{name}": value / len(self.layers) for name, value in seconds.items()}
        found |= crowding(self.stage, self.x)
        if dist.get_world_size() > 1:
            found |= {"exchange": exchange(self.x)}
        return found


def passes(layers: Sequence[nn.Module], x: Tensor) -> dict[str, float]:
    """Seconds of all layers, each with its own graph: forward, w J alone, the whole backward."""
    start, runs = time.perf_counter(), []
    for layer in layers:
        h = x.detach().requires_grad_()
        x = layer(h)
        runs.append((x, [h, *layer.parameters()], torch.ones_like(x)))
    found = {"forward": time.perf_counter() - start}
    for name, count in (("inputs", 1), ("backward", None)):
        start = time.perf_counter()
        for out, leaves, w in reversed(runs):
            torch.autograd.grad(out, leaves[:count], w, retain_graph=name == "inputs")
        found[name] = time.perf_counter() - start
    return found


def crowding(stage: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of a step of ``stage``, on rank 0 alone and then in all processes at once.

    Where cores, caches and memory are shared, the second takes longer.
    """
    dist.barrier()
    alone = _step(stage, x) if dist.get_rank() == 0 else 0.0
    dist.barrier()
    start = time.perf_counter()
    _step(stage, x)
    dist.barrier()
    return {"alone": alone, "together": time.perf_counter() - start}


def _step(stage: nn.Module, x: Tensor) -> float:
    stage.zero_grad()
    start = time.perf_counter()
    loss_of(stage(x)).backward()
    return time.perf_counter() - start


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
