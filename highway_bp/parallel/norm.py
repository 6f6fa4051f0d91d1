"""The norm of a sharded model's whole gradient, for clipping."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.method_state import sharded_chains


def total_norm(model: nn.Module) -> Tensor:
    """2-norm of the gradients of all parameters, the same on every process: a number.

    Parameters outside the sharded chains, which every process has alike, count once. Without a
    sharded chain it is ``torch.nn.utils.get_total_norm`` of the model's gradients.
    """
    sharded = sharded_chains(model)
    inside = {id(p): p for chain in sharded for p in chain.own_parameters()}
    others = {id(p) for chain in sharded for p in chain.parameters()}
    outside = [p for p in model.parameters() if id(p) not in others]
    whole = _norm(outside)
    if sharded:
        squares = _norm(list(inside.values())).double() ** 2
        dist.all_reduce(squares, group=sharded[0].ranks.group)
        whole = (whole.double() ** 2 + squares).sqrt().to(whole.dtype)
    return whole


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
