"""What every layer of a chain takes, measured layer by layer in a run of the user's own loss."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from highway_bp.chain import ResidualChain
from highway_bp.check import check_whole
from highway_bp.diagnostics.gradients import (
    Clock,
    checked_loss,
    clock_of,
    cuda_devices,
    unchanged,
)
from highway_bp.methods import Highway
from highway_bp.set_method import set_method, takers
from highway_bp.trunks.trunk import Trunk


def layer_seconds(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], repeats: int = 3
) -> list[float]:
    """What every layer takes: its forward and its backward pass, inputs and parameters.

    Args:
        model: has one `ResidualChain` or converted trunk, not sharded yet; its method, gradients,
            buffers and random state are afterwards what they were.
        loss_fn: ``loss_fn(model)`` runs the model on a batch and returns a scalar loss.
        repeats: runs that are measured, after one that warms up.

    Returns:
        Medians in seconds, in order; of a converted trunk, those of the model's own layers.

    Raises:
        ValueError: the model has no chain, several, a sharded or recurrent one; ``loss_fn`` does
            not run it.
        TypeError, ValueError: the loss is no scalar tensor with a gradient; ``repeats`` is no
            whole number of at least 1.
    """
    check_whole("repeats", repeats, least=1)
    chain, layers = _only_chain(model)
    with unchanged(model):
        set_method(model, Highway(0))  # a trunk's loop comes to its chain where that is cut
        runs = [_one_run(model, loss_fn, chain) for _ in range(1 + repeats)]
    medians = [statistics.median(seconds) for seconds in zip(*runs[1:], strict=True)]
    parts = len(chain) // layers
    return [sum(medians[i : i + parts]) for i in range(0, len(chain), parts)]


def _only_chain(model: nn.Module) -> tuple[ResidualChain, int]:
    """The chain of a model that has no other, and how many layers it is to `hb.shard`."""
    taker, *others = takers(model)
    chain = taker.chain if isinstance(taker, Trunk) else taker
    if others or not isinstance(chain, ResidualChain):
        names = ", ".join(type(t).__name__ for t in (chain, *others))
        raise ValueError(
            f"{type(model).__name__} has {names}; expected one ResidualChain or "
            "converted trunk, before hb.shard"
        )
    return chain, len(taker.layers) if isinstance(taker, Trunk) else len(chain)


def _one_run(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], chain: ResidualChain
) -> list[float]:
    """Seconds of every layer of the chain, in one call of ``loss_fn``."""
    layers = chain.forward = _ByThemselves(chain, clock_of(model))
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)):
            checked_loss(loss_fn(model))
    finally:
        del chain.forward
    if not layers.calls:
        raise ValueError("loss_fn did not run the model's chain; expected a loss that does")
    return layers.seconds


class _ByThemselves:
    """In place of a chain's forward: layer by layer, each forwards and backwards at once.

    So there is never more than one layer's graph.

    Attributes:
        seconds: of every layer, all calls added up.
    """

    def __init__(self, chain: ResidualChain, clock: Clock):
        self._chain, self._clock = chain, clock
        self.seconds, self.calls = [0.0] * len(chain), 0

    def __call__(self, h: Tensor, *args, return_states: bool = False, **kwargs):
        self.calls += 1
        states = []
        for i, layer in enumerate(self._chain):
            h_in = _leaf(h)
            start = self._clock()
            h_out = layer(h_in, *args, **kwargs)
            self.seconds[i] += self._clock() - start + self._backward(layer, h_in, h_out)
            h = _leaf(h_out)
            states.append(h)
        return states if return_states else h

    def _backward(self, layer: nn.Module, h_in: Tensor, h_out: Tensor) -> float:
        if not h_out.requires_grad:
            return 0.0
        wanted = [t for t in (h_in, *layer.parameters()) if t.requires_grad]
        w = torch.ones_like(h_out)
        with torch.autocast(w.device.type, enabled=False):  # which ends before a backward pass
            start = self._clock()
            torch.autograd.grad(h_out, wanted, w, allow_unused=True)
            return self._clock() - start


def _leaf(h: Tensor) -> Tensor:
    return h.detach().requires_grad_(h.requires_grad)
