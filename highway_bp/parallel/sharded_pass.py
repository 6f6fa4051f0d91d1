"""A sharded chain's forward and backward pass on one process, as autograd sees them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from highway_bp.chain import parameter_step
from highway_bp.first_order import first_order
from highway_bp.parallel import scans
from highway_bp.parallel.micro_batches import MicroBatches
from highway_bp.parallel.ranks import Ranks
from highway_bp.parallel.sharded_system import ShardedSystem
from highway_bp.watch import Watched

GATHER_BELOW = 1 << 20  # bytes of one state: larger ones are moved less by doubling


class ShardedPass(torch.autograd.Function):
    """As `_CutChain`, of one segment, the method solving a system that spans all processes."""

    @staticmethod
    def forward(ctx, chain, every, args, kwargs, x, token, *params):
        with torch.enable_grad():
            ctx.segment = chain.run(x, args, kwargs)
        ctx.chain, ctx.method, ctx.params = chain, Watched(chain.method, chain), params
        ctx.set_materialize_grads(False)
        return tuple(wanted(ctx.segment, every))

    @first_order
    def backward(ctx, *b):
        chain, segment = ctx.chain, ctx.segment
        if segment is None:
            raise RuntimeError(
                "Trying to backward through a ShardedChain a second time: its graph is freed"
            )
        if chain.kind is None:
            chain.kind = _largest_kind(chain.ranks, segment)
        b = [None] * (len(segment) - len(b)) + list(b)
        system = ShardedSystem(
            chain.ranks,
            segment,
            b,
            chain.gammas,
            _scan_for(chain.scan, segment.h_out),
            chain.kind,
            chain.replicas,
        )
        w = ctx.method.solve(system)
        grads = parameter_step(
            segment.parts,
            segment.cotangents_of_each(b),
            [w.first, *segment.of_each(w.out)],
            ctx.params,
            keep=False,
        )
        ctx.segment = None
        return None, None, None, None, w.first, None, *grads


def wanted(segment: MicroBatches, every: bool) -> list[Tensor]:
    """What the layers have returned, or the last of it."""
    return [segment.state(i) for i in range(len(segment))] if every else [segment.h_out.detach()]


def _largest_kind(ranks: Ranks, segment: MicroBatches) -> int:
    kind = torch.tensor([scans.kind_of(segment.carry())], device=segment.h_out.device)
    dist.all_reduce(kind, dist.ReduceOp.MAX, group=ranks.group)
    return int(kind.item())


def _scan_for(scan: str, state: Tensor) -> str:
    """Small messages wait, large ones take time to move."""
    if scan != "auto":
        return scan
    return "gathered" if state.numel() * state.element_size() < GATHER_BELOW else "doubling"
