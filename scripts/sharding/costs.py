"""What layers and messages cost: all that the performance model knows of a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.sharding.setting import Setting, loss_of

TURNS = 10  # messages there and back in one measurement
Seconds = dict[str, float]


class Costs:
    """Measured among the steps of the strategies, so that they see the same machine."""

    def __init__(self, setting: Setting):
        self.layers, self.x = setting.build(), setting.input()
        self.stage = nn.Sequential(*self.layers[: setting.layers // dist.get_world_size()])

    def take_turn(self) -> Seconds:
        """Seconds by name: an average layer's passes, a stage's step, a message's."""
        found = {}
        if dist.get_rank() == 0:
            seconds = passes(self.layers, self.x)
            found = {f"whole_{name}": value / len(self.layers) for name, value in seconds.items()}
        found |= crowding(self.stage, self.x)
        if dist.get_world_size() > 1:
            found |= {"exchange": exchange(self.x)}
        return found


@dataclass(frozen=True)
class Run:
    """A layer after its forward pass on some examples, on a graph of its own."""

    layer: nn.Module
    x: Tensor
    out: Tensor
    w: Tensor


def passes(layers: Sequence[nn.Module], x: Tensor) -> Seconds:
    """Seconds of all layers: forward, w J, and backward with parameters."""
    start = time.perf_counter()
    runs = _forward(layers, x)
    forward = time.perf_counter() - start
    inputs = _backward(runs, lambda run: [run.x], keep=True)
    backward = _backward(runs, lambda run: [run.x, *run.layer.parameters()], keep=False)
    return {"forward": forward, "inputs": inputs, "backward": backward}


def _forward(layers: Sequence[nn.Module], x: Tensor) -> list[Run]:
    runs = []
    for layer in layers:
        h = x.detach().requires_grad_()
        x = layer(h)
        runs.append(Run(layer, h, x, torch.ones_like(x)))
    return runs


def _backward(runs: Sequence[Run], wanted: Callable[[Run], list[Tensor]], keep: bool) -> float:
    for run in runs:
        for leaf in (run.x, *run.layer.parameters()):
            leaf.grad = None
    start = time.perf_counter()
    for run in reversed(runs):
        torch.autograd.backward(run.out, run.w, retain_graph=keep, inputs=wanted(run))
    return time.perf_counter() - start


def crowding(stage: nn.Module, x: Tensor) -> Seconds:
    """A step of ``stage`` in the first process alone, and in all of them at once.

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
    """Seconds of one message of ``x`` between the first two processes, the others waiting."""
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
