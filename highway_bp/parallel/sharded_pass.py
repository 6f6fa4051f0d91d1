"""The backward pass of a sharded chain: every process solves its part of one system."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from highway_bp.asked import asked_for
from highway_bp.containers import leaves, replaced
from highway_bp.first_order import first_order
from highway_bp.flow import refuse_freed
from highway_bp.has_method import CountedMethod
from highway_bp.own_gradients import refuse_own_gradients
from highway_bp.post_hooks import only_where_gradients_arrive
from highway_bp.segment import Segment, parameter_step
from highway_bp.shown import retained
from highway_bp.step import keep_buffers

if TYPE_CHECKING:
    from highway_bp.parallel.sharded_chain import ShardedChain


def through_ranks(
    chain: ShardedChain,
    h: Tensor,
    args: tuple,
    kwargs: dict,
    params: Sequence[Tensor],
    every: bool,
) -> list[Tensor]:
    """Run the chain; its outputs give gradients to h, tensors among the arguments and params."""
    given = args, kwargs
    wanted = {id(t): t for t in leaves(given) if isinstance(t, Tensor) and t.requires_grad}
    with keep_buffers():
        tensors = *wanted.values(), *params
        states = list(_ShardedPass.apply(chain, given, [*wanted], every, h, *tensors))
    for state in states[:-1]:
        state.register_hook(unserializable_hook(partial(_refuse_look, weakref.ref(state))))
    return states


def _refuse_look(ref: weakref.ref, _: Tensor) -> None:
    """Raise RuntimeError if somebody looks at the gradient of a state before the last one: autograd
    brings it the losses' share alone."""
    state = ref()
    if state is None:
        return
    asked = (state.grad_fn, state.output_nr) in (asked_for() or ())
    if asked or state.retains_grad or len(state._backward_hooks or ()) > 1:
        raise RuntimeError(
            "a look at the gradient of a state inside a ShardedChain: autograd has a part of it; "
            "expected a look at the chain's input or last state, or a ResidualChain"
        )


def _check_inside(segments: Sequence[Segment]) -> None:
    """Raise RuntimeError if somebody looks at the gradient of a tensor inside a layer."""
    for call in itertools.chain(*(segment.calls for segment in segments)):
        if retained(call.shown) or any(look.hooks for look in call.shown):
            raise RuntimeError(
                f"a hook or retain_grad on a tensor inside {call.layer.name}, whose gradient a "
                "ShardedChain brings in parts; expected a look at the chain's input or last state, "
                "or a ResidualChain"
            )


@contextlib.contextmanager
def _marked(solves: list) -> Iterator[None]:
    """Make ``solves`` true meanwhile."""
    solves.append(None)
    try:
        yield
    finally:
        solves.pop()


class _ShardedPass(torch.autograd.Function):
    """Forward: runs this process's layers, with a local graph. Backward: solves by the method, then
    computes the parameter gradients w_i df_i/dtheta_i."""

    @staticmethod
    def forward(ctx, chain, given, ids, every, h, *tensors):
        copies = {i: t.detach().requires_grad_() for i, t in zip(ids, tensors, strict=False)}
        ctx.leaves = [*copies.values(), *tensors[len(ids) :]]
        args, kwargs = replaced(given, copies, copies=True)
        solves = ctx.solves = []
        with torch.enable_grad():
            ctx.segments = chain.run(h, args, kwargs, ctx.leaves, lambda: bool(solves))
        ctx.chain, ctx.method = chain, CountedMethod(chain.method, chain)
        ctx.inputs = [h.detach() if h.requires_grad else None, *copies.values()]
        ctx.set_materialize_grads(False)
        return tuple(chain.outputs(ctx.segments, every))

    @first_order
    def backward(ctx, *grads):
        if ctx.segments is None:
            refuse_freed()
        segments = list(ctx.segments)
        _check_inside(segments)
        suspects = [call.layer for s in segments if s.functions for call in s.calls]
        with refuse_own_gradients(suspects), _marked(ctx.solves):
            ctx.chain.refuse_unrepeatable(segments)
            system = ctx.chain.system(segments, grads)
            ctx.chain.refuse_not_additive(system)
            w = ctx.method.solve(system)
            b, w_ends = system.b_segments, system.ends(w)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                ctx.segments = None
            del system  # it holds the segments, too
            of_leaves = parameter_step(segments, b, w_ends, ctx.leaves)
        w_0, arguments = w[0], len(ctx.inputs) - 1
        if w_0 is None and ctx.inputs[0] is not None:
            w_0 = torch.zeros_like(ctx.inputs[0])
        of_inputs = ctx.chain.summed([w_0, *of_leaves[:arguments]], ctx.inputs)
        only_where_gradients_arrive(ctx.leaves[arguments:], of_leaves[arguments:])
        return None, None, None, None, *of_inputs, *of_leaves[arguments:]
