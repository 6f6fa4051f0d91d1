"""The network of bench_sharded.py, and the strategies that train it on several processes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import highway_bp as hb
from highway_bp.parallel.ranks import shares_of
from scripts.transformer_layers import sublayers


@dataclass(frozen=True)
class Setting:
    """A transformer of sublayers and its input (batch, length, width), the same in every process.

    micro_batches: number of parts of the batch, for the strategies that divide it.
    """

    layers: int = 24
    width: int = 256
    batch: int = 8
    length: int = 256
    micro_batches: int = 4

    def build(self) -> list[nn.Module]:
        """A new copy of the network, always with the same weights."""
        torch.manual_seed(0)
        return sublayers(self.layers, self.width, heads=4)

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, self.length, self.width, generator=generator)


@dataclass(frozen=True)
class Strategy:
    """One strategy in this process.

    Attributes:
        step: runs forward and backward pass; returns `time.perf_counter` between the two, or None
            if they are not separate.
        parameters: those whose gradients this process computes.
        exact: whether these gradients are backpropagation's.
    """

    step: Callable[[], float | None]
    parameters: dict[str, nn.Parameter]
    exact: bool = True

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None


def strategies(setting: Setting) -> dict[str, Strategy]:
    """All strategies, by their names in the record; every process builds its own."""
    return (
        sharded(setting, 1, "")
        | sharded(setting, setting.micro_batches, "_micro")
        | pipelines(setting)
        | {"data_parallel": data_parallel(setting)}
    )


def sharded(setting: Setting, micro_batches: int, suffix: str) -> dict[str, Strategy]:
    """Backpropagation and Highway-BP through a `ShardedChain`; exact from k = P - 1 on."""
    chain, x = hb.ShardedChain(setting.build(), micro_batches=micro_batches), setting.input()
    most, parameters = chain.ranks.size - 1, named(chain, chain.own)

    def with_method(method: hb.Method) -> Callable[[], float]:
        def step() -> float:
            chain.method = method
            return forward_and_backward(chain, x)

        return step

    found = {"bp": Strategy(with_method(hb.Backprop()), parameters)}
    for k in sorted(k for k in {0, 1, most} if k <= most):
        found[f"k{k}"] = Strategy(with_method(hb.Highway(k)), parameters, exact=k == most)
    return {name + suffix: strategy for name, strategy in found.items()}


def pipelines(setting: Setting) -> dict[str, Strategy]:
    """torch.distributed.pipelining; with one micro-batch it is plain model parallelism."""
    layers, x = setting.build(), setting.input()
    rank, P = dist.get_rank(), dist.get_world_size()
    own = shares_of(len(layers), P)[rank]
    stage = nn.Sequential(*(layers[i] for i in own))

    def scheduled(schedule: type, micro_batches: int) -> Strategy:
        # Every schedule has its own stage: a stage learns its shapes once, at the first step.
        place = PipelineStage(stage, rank, P, torch.device("cpu"))
        run = schedule(place, micro_batches, loss_fn=loss_of)
        inputs = [x] if place.is_first else []
        target = {"target": x} if place.is_last else {}

        def step() -> None:
            run.step(*inputs, return_outputs=False, **target)

        return Strategy(step, named(layers, own))

    return {
        "model_parallel": scheduled(ScheduleGPipe, 1),
        "gpipe": scheduled(ScheduleGPipe, setting.micro_batches),
        "1f1b": scheduled(Schedule1F1B, setting.micro_batches),
    }


def data_parallel(setting: Setting) -> Strategy:
    """Every process runs all layers on its share of the examples."""
    layers = setting.build()
    model = DistributedDataParallel(nn.Sequential(*layers))
    x = setting.input().chunk(dist.get_world_size())[dist.get_rank()]
    return Strategy(lambda: forward_and_backward(model, x), named(layers, range(len(layers))))


def forward_and_backward(model: nn.Module, x: Tensor) -> float:
    """Run a step; return `time.perf_counter` between its passes."""
    loss = loss_of(model(x))
    between = time.perf_counter()
    loss.backward()
    return between


def loss_of(h: Tensor, target: Tensor | None = None) -> Tensor:
    """The mean square of ``h``; pipelines pass a target to every loss, which is not used."""
    return h.square().mean()


def named(layers: Sequence[nn.Module], own: Sequence[int]) -> dict[str, nn.Parameter]:
    return {f"{i}.{name}": p for i in own for name, p in layers[i].named_parameters()}
