"""`replicate`: data parallelism beside the sharing of layers."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from highway_bp.method_state import sharded_chains


def replicate(model: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
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
        The model in torch's own wrapper, to be called in its place while training.
    """
    others = _of_other_processes(model)
    named = [*model.named_parameters(remove_duplicate=False),
             *model.named_buffers(remove_duplicate=False)]  # fmt: skip
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, tensor in named if id(tensor) in others])  # fmt: skip
    return DistributedDataParallel(model, process_group=group)


def _of_other_processes(model: nn.Module) -> set[int]:
    """ids of parameters and buffers of layers that this process does not run."""
    layers = [(i in chain.own, layer) for chain in sharded_chains(model)
              for i, layer in enumerate(chain)]  # fmt: skip
    tensors = [(owned, id(t)) for owned, layer in layers
               for t in [*layer.parameters(), *layer.buffers()]]  # fmt: skip
    return {t for owned, t in tensors if not owned} - {t for owned, t in tensors if owned}
