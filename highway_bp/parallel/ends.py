"""Where a sharded chain meets what all processes compute alike: its input and its states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from highway_bp.parallel.ranks import Ranks


def enter(ranks: Ranks, h: Tensor) -> Tensor:
    """h_0; its gradient, which the first process finds, comes to all."""
    return _Enter.apply(h, ranks) if h.requires_grad and torch.is_grad_enabled() else h


def arrive(ranks: Ranks, own: Sequence[Tensor], shares: Sequence[range] | None) -> list[Tensor]:
    """All states on all processes, of which each has its share; without, the last process's last.

    A gradient goes to its state's owner alone.
    """
    last = [(ranks.size - 1, len(own) - 1)]
    owned = (
        [(rank, i) for rank, share in enumerate(shares) for i in range(len(share))]
        if shares
        else last
    )
    return [
        _arrived(ranks, own[i] if rank == ranks.rank else None, own[-1], rank) for rank, i in owned
    ]


def _arrived(ranks: Ranks, mine: Tensor | None, anchor: Tensor, source: int) -> Tensor:
    if mine is not None:
        ranks.broadcast_state(mine.detach(), source)
        return mine
    value = ranks.broadcast_state(anchor.detach(), source)
    return _Arrive.apply(anchor, value) if torch.is_grad_enabled() else value


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, ranks):
        ctx.ranks, ctx.like = ranks, h.detach()
        ctx.set_materialize_grads(False)
        return h.view_as(h)

    @staticmethod
    def backward(ctx, w):
        # All in one layout: what is sent are bytes.
        w = torch.zeros_like(ctx.like) if w is None else w
        w = w.contiguous()
        dist.broadcast(w, group=ctx.ranks.group, group_src=0)
        return w, None


class _Arrive(torch.autograd.Function):
    """A state from elsewhere: no gradient, yet the backward pass goes on to ``anchor``."""

    @staticmethod
    def forward(ctx, anchor, value):
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx, w):
        return None, None
