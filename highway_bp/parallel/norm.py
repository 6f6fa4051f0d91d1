"""The norm of a sharded model's whole gradient, for clipping."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.method_state import sharded_chains


def total_norm(model: nn.Module) -> Tensor:
    """2-norm of the gradients of all parameters, the same on every process: a number.

    It is ``torch.nn.utils.get_total_norm``, to the bit: of a sharded model every process forms the
    norms of its own layers' gradients, the first one also those outside the sharded chains, which
    all have alike.
    """
    parameters = list(model.parameters())
    sharded = sharded_chains(model)
    if not sharded:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    ranks = sharded[0].ranks
    own = {id(p) for chain in sharded for p in chain.own_parameters()}
    norms = torch.zeros(len(parameters), dtype=parameters[0].dtype, device=ranks.device)
    for i, p in enumerate(parameters):
        if p.grad is not None and (ranks.is_first or id(p) in own):
            norms[i] = torch.linalg.vector_norm(p.grad)
    dist.all_reduce(norms, group=ranks.group)
    return torch.linalg.vector_norm(norms)
