"""`shard` spreads a model's layers over the processes of a group. `replicate` averages gradients
over several such groups, each with another part of a batch."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from highway_bp.chain import ResidualChain
from highway_bp.has_method import Chain, HasMethod
from highway_bp.method_state import sharded_chains, trunks
from highway_bp.parallel.agreement import check_weights
from highway_bp.parallel.owners import free_foreign_tensors, of_others
from highway_bp.parallel.ranks import Ranks
from highway_bp.parallel.sharded_chain import ShardedChain


def shard(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    scan: str = "auto",
    micro_batches: int = 1,
) -> list[ShardedChain]:
    """Turn every `ResidualChain` of ``model`` into a `ShardedChain`, in place.

    All processes of the group build the same model (same weights), shard it, and train it with the
    same batches and calls. Each keeps the weights of its own layers and everything outside the
    chain; of other weights it keeps only name and shape. `whole_state_dict` collects all.

    Args:
        group: the processes; None for all.
        sizes: layers per process; None for shares as equal as possible.
        scan, micro_batches: see `ShardedChain`.

    Returns:
        The sharded chains.

    Raises:
        RuntimeError: torch.distributed has not been started.
        ValueError: the model has no chain, or it has a recurrent layer or a converted trunk; more
            processes than layers; different weights; a parameter that two processes would share.
    """
    if converted := trunks(model):
        raise ValueError(
            f"{converted[0]} is a converted trunk, whose layers the model calls itself; expected "
            "a model whose layers are a ResidualChain"
        )
    found = [m for m in model.modules() if isinstance(m, HasMethod)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no ResidualChain; expected a model whose layers are one"
        )
    if recurrent := [m for m in found if not isinstance(m, Chain)]:
        raise ValueError(
            f"{type(recurrent[0]).__name__} has time steps, not layers of its own; "
            "expected a model of residual layers"
        )
    check_weights(Ranks(group), model)
    how = group, sizes, scan, micro_batches
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ResidualChain):
                setattr(parent, name, ShardedChain(child, child.method, *how))
    free_foreign_tensors(model)
    return sharded_chains(model)


def replicate(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Average gradients over processes with the same layers and different parts of a batch.

    With a 2-D ``DeviceMesh`` of the dimensions "data" and "layers", `shard` takes the group of
    "layers" and `replicate` the group of "data"::

        hb.shard(model, mesh["layers"].get_group())
        trained = hb.replicate(model, mesh["data"].get_group())
        criterion(trained(x_part), y_part).backward()

    Args:
        model: sharded by `shard`, or not at all.
        group: the processes that have the same layers.

    Returns:
        The model in torch's ``DistributedDataParallel``: call this wrapper in training. If this
        process has nothing to train, the model itself.
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
