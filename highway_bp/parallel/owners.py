"""Which process owns which tensors of a sharded model, and how values are collected."""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.method_state import sharded_chains

OUTSIDE = -1  # rank of what lies outside the chains


def owners(model: nn.Module) -> dict[int, int]:
    """By id of a tensor inside the sharded chains, the process that runs its layer.

    Tensors outside the chains, and buffers of several processes, are left out: all have them.

    Raises:
        ValueError: a parameter is in layers of two processes, or in one and outside the chains:
            each process would have a part of its gradient.
    """
    holders: dict[int, set[int]] = defaultdict(set)  # by id, the processes
    inside = set()
    for chain in sharded_chains(model):
        for rank, share in enumerate(chain.shares):
            for module in (m for i in share for m in chain[i].modules()):
                inside.add(module)
                for t in _tensors(module):
                    holders[id(t)].add(rank)
    for module in set(model.modules()) - inside:
        for t in _tensors(module):
            holders[id(t)].add(OUTSIDE)
    for parameter in model.parameters():
        if len(holders[id(parameter)]) > 1:
            named = model.named_parameters(remove_duplicate=False)
            raise ValueError(
                f"{' = '.join(name for name, p in named if p is parameter)} is shared by layers of "
                "different processes, or with what is outside the chain; expected one process to "
                "have its whole gradient"
            )
    return {t: min(found) for t, found in holders.items() if len(found) == 1 and found != {OUTSIDE}}


def of_others(model: nn.Module) -> set[int]:
    """The ids of the tensors that other processes own (`owners`)."""
    return {t for t, rank in owners(model).items() if rank != _ranks(model).rank}


def free_foreign_tensors(model: nn.Module) -> None:
    """Replace tensors that other processes own by empty ones on device "meta", without memory."""
    others, made = of_others(model), {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if id(t) in others:
                    held[name] = made.setdefault(id(t), _emptied(t))


def from_owners(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect values by name of parameter; all processes call it and get the same, to the bit.

    A process gives values for its own layers' parameters and for those outside the sharded chains.
    For the latter, the first process's values count. Without a sharded chain, the process's own
    values are returned.

    Args:
        values: small values of any kind.

    Returns:
        The values in the order of the model's parameters.
    """
    if not sharded_chains(model):
        return dict(values)
    everyone = _ranks(model).all_gather_object(dict(values))
    found = {name: value for theirs in reversed(everyone) for name, value in theirs.items()}
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of a sharded model as if it were whole, for a checkpoint.

    All processes of a group call it. The first gets the whole ``state_dict``, with the parts of
    other processes on the CPU; the others get their own part. A model on one process loads it by
    ``load_state_dict``, a sharded model by `load_whole_state_dict`.
    """
    state = model.state_dict()
    if not sharded_chains(model):
        return state
    ranks, owner = _ranks(model), owners(model)
    owned = {name: owner.get(id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    own = [name for name in state if owned[name] == ranks.rank and not ranks.is_first]
    mine = {name: state[name].cpu() for name in own}
    everyone = [None] * ranks.size if ranks.is_first else None
    dist.gather_object(mine, everyone, group=ranks.group, group_dst=0)
    theirs = {name: t for found in everyone or [] for name, t in found.items()}
    state = {name: theirs.get(name, value) for name, value in state.items()}
    return {name: value for name, value in state.items() if not getattr(value, "is_meta", False)}


def load_whole_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a whole ``state_dict``; a sharded model takes the part of this process.

    Raises:
        RuntimeError: ``state`` is of another model.
    """
    with warnings.catch_warnings():  # tensors of other processes are not loaded
        warnings.filterwarnings("ignore", message=".*is a no-op")
        model.load_state_dict(state)


def total_norm(model: nn.Module) -> Tensor:
    """2-norm of the gradients of all parameters, a 0-d tensor, the same on every process.

    It equals ``torch.nn.utils.get_total_norm`` of the whole model, to the bit. In a sharded model
    every process contributes the norms of its own layers' gradients, and the first process those
    outside the sharded chains, which all processes have alike.
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


def _ranks(model: nn.Module):
    return sharded_chains(model)[0].ranks


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return [t for t in held if t is not None]


def _emptied(t: Tensor) -> Tensor:
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
