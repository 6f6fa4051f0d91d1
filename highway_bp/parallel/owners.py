"""Which process has what of a sharded model, and how it is brought together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from highway_bp.method_state import sharded_chains

T = TypeVar("T")


def owners(model: nn.Module) -> dict[int, int]:
    """By id of a tensor inside the sharded chains, the process that runs its layer.

    What lies outside of them, or in layers of several processes, all have alike.

    Raises:
        ValueError: a parameter is in layers of two processes, or in one and outside the chains:
            each would have a part of its gradient.
    """
    inside = {
        id(module)
        for chain in sharded_chains(model)
        for layer in chain
        for module in layer.modules()
    }
    everywhere = {
        id(t): -1
        for module in model.modules()
        if id(module) not in inside
        for t in _tensors(module)
    }
    found: dict[int, int] = {}
    for rank, t in _in_layers(model):
        other = found.setdefault(id(t), everywhere.get(id(t), rank))
        if other != rank:
            if isinstance(t, nn.Parameter):
                raise ValueError(
                    f"{_name(model, t)} is shared by layers of different processes, "
                    "or with what is outside the chain; expected one process to have "
                    "its whole gradient"
                )
            found[id(t)] = -1
    return {t: rank for t, rank in found.items() if rank >= 0}


def of_others(model: nn.Module) -> set[int]:
    """ids of what other processes alone have."""
    return {t for t, rank in owners(model).items() if rank != _ranks(model).rank}


def let_go(model: nn.Module) -> None:
    """Keep name, shape and dtype of what other processes have, and no memory (device "meta")."""
    others, made = of_others(model), {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if id(t) in others:
                    held[name] = made.setdefault(id(t), _emptied(t))


def from_owners(model: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """Values by name of parameter of all processes, to the bit the same on each.

    A process has values of its own layers' parameters, and of those outside the sharded chains.
    The latter all have alike; those of the first process count. Without a sharded chain they are
    the process's own.

    Args:
        values: small and of any kind; called by all processes.

    Returns:
        The values in the order of the model's parameters.
    """
    if not sharded_chains(model):
        return dict(values)
    everyone = _ranks(model).everyone(dict(values))
    found = {name: value for theirs in reversed(everyone) for name, value in theirs.items()}
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` of a sharded model as if it were whole, for a checkpoint.

    All processes of a group call it; the first gets it whole, what others have on the CPU. The
    rest get their own part. One process alone reads it by ``load_state_dict`` as ever, a sharded
    model by `load_whole_state_dict`.
    """
    if not sharded_chains(model):
        return model.state_dict()
    state = model.state_dict(keep_vars=True)
    ranks, owner = _ranks(model), owners(model)
    for name, t in state.items():
        rank = owner.get(id(t), 0)
        if rank == 0:
            continue
        if ranks.is_first:
            arriving = torch.empty_like(t, device=ranks.device)
            ranks.exchange([], [(arriving, rank)])
            state[name] = arriving.cpu()
        elif ranks.rank == rank:
            ranks.exchange([(t.detach(), 0)], [])
    kept = {name: t for name, t in state.items() if not getattr(t, "is_meta", False)}
    return {name: t.detach() if isinstance(t, Tensor) else t for name, t in kept.items()}


def load_whole_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a whole ``state_dict``, of which a sharded model takes what this process has.

    Raises:
        RuntimeError: it is of another model.
    """
    with warnings.catch_warnings():  # what others have is left out
        warnings.filterwarnings("ignore", message=".*is a no-op")
        model.load_state_dict(state)


def _ranks(model: nn.Module):
    return sharded_chains(model)[0].ranks


def _in_layers(model: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Every tensor of the chains' layers and the process that runs the layer."""
    for chain in sharded_chains(model):
        for rank, share in enumerate(chain.shares):
            for module in (m for i in share for m in chain[i].modules()):
                yield from ((rank, t) for t in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return [t for t in held if t is not None]


def _emptied(t: Tensor) -> Tensor:
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    named = model.named_parameters(remove_duplicate=False)
    return " = ".join(name for name, p in named if p is parameter)
