"""Passes of training as CUDA graphs: the same kernels on the same numbers, launched all at once.

A pass of many small kernels takes as long as Python needs to launch them. A replay takes only
as long as the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import highway_bp as hb
from experiments.errors import UserError

EAGER = 3  # passes of a method before its graph is captured; they set up what later passes use
ALLOWED = 1e-3  # relative difference of a replay's gradient; kernels may add in another order

Gradients = list[tuple[nn.Parameter, Tensor | None]]


@dataclass(frozen=True)
class Passed:
    """What a pass has measured, by name, and how many iterations its gradient took."""

    measured: dict[str, Tensor]
    iterations: int


class GraphedPasses:
    """A model's forward and backward passes on batches of one shape, as a graph per method.

    Args:
        run: ``run(x, y)`` does one pass. It sets the ``grad`` of parameters that had None.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor, Tensor], Passed]) -> None:
        self._model, self._run, self._stream = model, run, torch.cuda.Stream()
        self._method: hb.Method | None = None

    def __call__(self, method: hb.Method, x: Tensor, y: Tensor) -> Passed:
        """Return what ``run(x, y)`` returns; ``method`` is the model's current method.

        Raises UserError if the pass cannot be captured, or a replay gives another gradient.
        """
        if method != self._method:
            self._method, self._eager, self._graph = method, 0, None
        if self._graph is not None:
            return self._graph.replay(x, y)
        passed = self._aside(x, y)
        self._eager += 1
        if self._eager == EAGER:
            self._graph = self._captured(x, y)
        return passed

    def _aside(self, x: Tensor, y: Tensor) -> Passed:
        """Run the pass on our own stream: a capture would wait for work on the default stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            passed = self._run(x, y)
        torch.cuda.current_stream().wait_stream(self._stream)
        return passed

    def _captured(self, x: Tensor, y: Tensor) -> _Graph:
        """Capture the pass that has just run, and check a replay. Gradients and buffers stay."""
        wanted, buffers = self._gradients(), [(b, b.clone()) for b in self._model.buffers()]
        self._model.zero_grad(set_to_none=True)
        graph, x, y = torch.cuda.CUDAGraph(), x.clone(), y.clone()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                passed = self._run(x, y)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"trainer.cuda_graph: a pass of this model cannot be captured ({why}); expected "
                "false"
            ) from error
        found = _Graph(graph, x, y, passed, self._gradients())
        found.replay(x, y)
        error = _difference(found.gradients, wanted)
        for buffer, before in buffers:
            buffer.copy_(before)
        for p, gradient in wanted:
            p.grad = gradient
        if error > ALLOWED:  # false for nan, which means that training has diverged
            raise UserError(
                f"trainer.cuda_graph: a replay differs from its pass by {error:.1g} of the "
                "gradient (dropout draws other numbers); expected false"
            )
        return found

    def _gradients(self) -> Gradients:
        return [(p, p.grad) for p in self._model.parameters()]


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    passed: Passed
    gradients: Gradients

    def replay(self, x: Tensor, y: Tensor) -> Passed:
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        for p, gradient in self.gradients:
            p.grad = gradient
        return self.passed


def _difference(found: Gradients, wanted: Gradients) -> float:
    """Return the relative difference of all gradients as one vector; inf if one is missing."""
    pairs = [(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    pairs = [(a, b) for a, b in pairs if a is not None]
    difference = get_total_norm([a - b for a, b in pairs])
    return (difference / get_total_norm([b for _, b in pairs])).item()
