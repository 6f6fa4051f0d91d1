"""`shard`: let the processes of a group run a model's layers, each its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from highway_bp.chain import ResidualChain
from highway_bp.method_state import chains, sharded_chains, trunks
from highway_bp.parallel.agreement import check_weights
from highway_bp.parallel.owners import let_go
from highway_bp.parallel.ranks import Ranks
from highway_bp.parallel.sharded_chain import ShardedChain
from highway_bp.set_method import takers


def shard(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    scan: str = "auto",
    micro_batches: int = 1,
) -> list[ShardedChain]:
    """Turn every `ResidualChain` and converted trunk of ``model`` into a `ShardedChain`, in place.

    All processes of the group build the same model (same weights), shard it, and train it alike:
    same batches, same calls. Each keeps the weights of its own layers and what is outside the
    chain; those of other layers keep name and shape. `whole_state_dict` brings all together.

    Args:
        sizes: layers per process, of a converted trunk the model's own layers; None for shares as
            equal as can be.
        scan, micro_batches: as of a `ShardedChain`.

    Returns:
        The sharded chains.

    Raises:
        RuntimeError: torch.distributed has not been started.
        ValueError: there is no chain, a recurrent layer is among them, more processes than
            layers, different weights, or a parameter that two processes would share.
    """
    recurrent = [t for t in takers(model) if t not in list(chains(model)) + trunks(model)]
    if recurrent:
        raise ValueError(
            f"{type(recurrent[0]).__name__} has time steps, not layers of its own; "
            "expected a model of residual layers"
        )
    check_weights(Ranks(group), model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ResidualChain):
                setattr(
                    parent,
                    name,
                    ShardedChain(child, child.method, group, sizes, scan, micro_batches),
                )
    for trunk in trunks(model):
        trunk.shard(group, sizes, scan, micro_batches)
    let_go(model)
    return sharded_chains(model)
