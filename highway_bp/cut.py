"""A chain's forward pass on graphs cut between its segments, and the backward pass that a method
solves: what a `ResidualChain` and a `ShardedChain` have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.auto_gamma import GammaMemory
from highway_bp.first_order import first_order
from highway_bp.leaves import check_leaves
from highway_bp.methods import LinearSystem, States
from highway_bp.segment import Segment, run_segment
from highway_bp.split_check import check_split
from highway_bp.takes_method import TakesMethod
from highway_bp.watch import Watched


class ChainSystem(LinearSystem, Protocol):
    """The linear system of segments, in the order of ``segments``.

    Attributes:
        b_segments: of every segment the cotangents of all its states, None where no loss arrives.
    """

    segments: Sequence[Segment]
    b_segments: Sequence[Sequence[Tensor | None]]

    def ends(self, w: States) -> Sequence[Tensor | None]:
        """Of every segment the gradient at its last state."""


class Cut(TakesMethod, nn.ModuleList):
    """A list of layers that can be run on cut graphs.

    Attributes:
        gammas: estimates for gamma="auto".
        iterations: of the last backward pass.
    """

    def __init__(self, layers):
        super().__init__(layers)
        self.gammas = GammaMemory()
        self.iterations: list[int] = []
        self._checked = False  # by the first pass: captured tensors, carries

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> list[Segment]:
        """The segments, each run once."""
        raise NotImplementedError

    def outputs(self, segments: Sequence[Segment], every: bool) -> list[Tensor]:
        """The states h_1 .. h_L that the chain returns, or h_L alone, without graphs."""
        raise NotImplementedError

    def system(self, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> ChainSystem:
        """The backward pass, from the gradients of `outputs`."""
        raise NotImplementedError

    def summed(self, grads: list[Tensor | None], inputs: list[Tensor | None]) -> list:
        """Gradients of ``inputs``, h_0 and arguments, None where none is wanted; added up where
        each process finds a part of them."""
        return grads

    def run_group(self, group: range, h: Tensor, args: tuple, kwargs: dict) -> Segment:
        """Consecutive layers as one segment, checked on the first pass."""
        layers = [self[i] for i in group]
        names = [f"layer {i} ({self[i]._get_name()})" for i in group]
        segment = run_segment(layers, names, h, args, kwargs)
        if not self._checked and torch.is_grad_enabled():
            check_split(segment)
        segment.z = None  # a hidden state of memory
        return segment

    @torch.compiler.disable(recursive=False)
    def cut(
        self, h: Tensor, args: tuple, kwargs: dict, params: Sequence[Tensor], every: bool
    ) -> list[Tensor]:
        """`outputs`, with gradients for h, for tensors among the arguments and for ``params``."""
        flat, spec, wanted = flattened(args, kwargs)
        ids = [id(t) for t in wanted]
        # torch.compile'd layers may not give their buffers away: the graph is walked k + 1 times.
        with _keep_buffers():
            return list(_CutChain.apply(self, (flat, spec, ids), every, h, *wanted, *params))


class _CutChain(torch.autograd.Function):
    """Forward: every segment on a graph of its own. Backward: the method's solution, then one
    pass for all parameter gradients w_i df_i/dtheta_i."""

    @staticmethod
    def forward(ctx, chain, arguments, every, h, *leaves):
        flat, spec, ids = arguments
        copies = {i: t.detach().requires_grad_() for i, t in zip(ids, leaves, strict=False)}
        args, kwargs = pytree.tree_unflatten([copies.get(id(t), t) for t in flat], spec)
        with torch.enable_grad():
            segments = chain.run(h, args, kwargs)
        ctx.chain, ctx.segments, ctx.method = chain, segments, Watched(chain.method, chain)
        ctx.inputs = [h.detach() if h.requires_grad else None, *copies.values()]
        ctx.leaves = [*copies.values(), *leaves[len(ids) :]]
        ctx.set_materialize_grads(False)
        if not chain._checked:
            check_leaves(segments, ctx.leaves)
            chain._checked = True
        return tuple(chain.outputs(segments, every))

    @first_order
    def backward(ctx, *grads):
        if ctx.segments is None:
            raise RuntimeError(
                f"Trying to backward through a {ctx.chain._get_name()} a second time: the graphs "
                "of its layers are freed. Call the first backward() with retain_graph=True"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        system = ctx.chain.system(ctx.segments, grads)
        w = ctx.method.solve(system)
        leaf_grads = parameter_step(system, system.ends(w), ctx.leaves, keep)
        w_0, arguments = w[0], len(ctx.inputs) - 1
        if w_0 is None and ctx.inputs[0] is not None:
            w_0 = torch.zeros_like(ctx.inputs[0])
        of_inputs = ctx.chain.summed([w_0, *leaf_grads[:arguments]], ctx.inputs)
        if not keep:
            ctx.segments = None
        return None, None, None, *of_inputs, *leaf_grads[arguments:]


def parameter_step(
    system: ChainSystem, ends: Sequence[Tensor | None], leaves: Sequence[Tensor], keep: bool
) -> list[Tensor | None]:
    """w_i df_i/dtheta_i of all layers in one pass of the autograd engine."""
    outputs, cotangents = [], []
    for segment, b_segment, w_end in zip(system.segments, system.b_segments, ends, strict=True):
        for state, c in zip(segment.states, [*b_segment[:-1], w_end], strict=True):
            if c is not None and state.requires_grad:
                outputs.append(state)
                cotangents.append(c)
    grads: list[Tensor | None] = [None] * len(leaves)
    if outputs and leaves:
        grads = list(
            torch.autograd.grad(outputs, leaves, cotangents, retain_graph=keep, allow_unused=True)
        )
    if any(w_end is None for w_end in ends):  # layers no path has reached: zero, not "unused"
        grads = [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
        ]
    return grads


def flattened(args: tuple, kwargs: dict) -> tuple[list, object, list[Tensor]]:
    """Arguments in one list, how to put them together again, and which want a gradient, once each.

    Only plain containers are opened: a key-value cache is one object, written into.
    """
    flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_no_container)
    tensors = {id(t): t for t in flat if isinstance(t, Tensor)}
    return flat, spec, [t for t in tensors.values() if t.requires_grad]


def is_no_container(value: object) -> bool:
    return type(value) not in (tuple, list, dict)


def _keep_buffers():
    """Tell the compiler, where it is in use, that backward graphs are walked more than once."""
    config = sys.modules.get("torch._functorch.config")
    return contextlib.nullcontext() if config is None else config.patch(donated_buffer=False)
