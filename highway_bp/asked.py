"""What the running calls of `torch.autograd.grad` and ``backward()`` were given: losses and inputs.

Autograd shows a node neither. A chain needs both: the gradient of an input is given out before the
node behind it runs, and paths from the losses that lead to no input are not run at all.
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
    """The inputs: the tensors whose gradients the calls were asked for."""
    return _arguments("inputs")  # also inputs_tuple: inputs may be a generator that has run out


def losses() -> Iterator[GradientEdge]:
    """The tensors that the calls begin with."""
    return _arguments("outputs", "tensors")


def _arguments(*names: str) -> Iterator[GradientEdge]:
    """From the frames of all threads, as a GPU's nodes run in a thread of the engine."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code in _CALLS:
                given = frame.f_locals.items()
                yield from _edges([v for key, v in given if any(name in key for name in names)])
            frame = frame.f_back


def _edges(given: object) -> Iterator[GradientEdge]:
    for t in pytree.tree_leaves(given, is_leaf=lambda t: isinstance(t, GradientEdge)):
        if isinstance(t, Tensor):
            yield GradientEdge(t.grad_fn, t.output_nr)
        elif isinstance(t, GradientEdge):
            yield t
