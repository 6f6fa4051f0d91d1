"""Whose gradients `torch.autograd.grad` or ``backward(inputs=...)`` was asked for.

Autograd gives these out on the way, before the nodes run that they belong to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

_CALLS = torch.autograd.grad.__code__, torch.autograd.backward.__code__


def asked_for() -> Iterator[GradientEdge]:
    """What the calls in progress were asked for, those of other threads as well: on a GPU, nodes
    run in a thread of the engine."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code in _CALLS:
                # Also inputs_tuple: inputs may be a generator that has run out.
                inputs = [v for name, v in frame.f_locals.items() if "inputs" in name]
                yield from _edges(inputs)
            frame = frame.f_back


def _edges(inputs: object) -> Iterator[GradientEdge]:
    for t in pytree.tree_leaves(inputs, is_leaf=lambda t: isinstance(t, GradientEdge)):
        if isinstance(t, Tensor):
            yield GradientEdge(t.grad_fn, t.output_nr)
        elif isinstance(t, GradientEdge):
            yield t
