"""`replicate`: data parallelism beside the sharing of layers."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from highway_bp.method_state import sharded_chains
from highway_bp.parallel.owners import of_others
from highway_bp.parallel.ranks import Ranks


def replicate(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Average the gradients over processes with the same layers and each its part of a batch.

    Of a 2-D ``DeviceMesh`` with the dimensions "data" and "layers", `shard` takes the group of the
    second and this the group of the first::

        hb.shard(model, mesh["layers"].get_group())
        trained = hb.replicate(model, mesh["data"].get_group())
        criterion(trained(x_part), y_part).backward()

    Args:
        model: sharded by `shard`, or not at all.
        group: the processes that have the same layers.

    Returns:
        The model in torch's own wrapper, to be called in its place while training; itself where
        this process has nothing to train.
    """
    for chain in sharded_chains(model):
        chain.replicas = Ranks(group)
    others = of_others(model)
    if not any(p.requires_grad and id(p) not in others for p in model.parameters()):
        return model
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, tensor in named if id(tensor) in others]
    )
    return DistributedDataParallel(model, process_group=group)
