"""Whose gradients `torch.autograd.grad` or ``backward(inputs=...)`` was asked for.

Autograd hands these out on the way, without a word to the nodes that they belong to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch.autograd import graph

_CALL = graph._engine_run_backward.__code__  # every backward pass that Python starts
_INPUTS = 3  # where this function has them among its arguments behind the first


def asked_for() -> list[tuple[object, int]]:
    """(node, number of its output) of all tensors that the backward passes in progress were asked
    for, those of other threads as well: on a GPU, nodes run in a thread of the engine."""
    inputs = (t for frame in _frames() if frame.f_code is _CALL for t in _inputs(frame))
    return [
        (t.node if isinstance(t, graph.GradientEdge) else t.grad_fn, t.output_nr) for t in inputs
    ]


def _inputs(call: FrameType) -> tuple:
    return call.f_locals["args"][_INPUTS]


def _frames() -> Iterator[FrameType]:
    for frame in sys._current_frames().values():
        while frame is not None:
            yield frame
            frame = frame.f_back
