"""The chains of a model, and the estimates of gamma that belong in a checkpoint."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from highway_bp.chain import ResidualChain
from highway_bp.parallel.sharded_chain import ShardedChain
from highway_bp.trunks.converted import ConvertedLayer
from highway_bp.trunks.trunk import Trunk


def trunks(model: nn.Module) -> list[Trunk]:
    """The converted trunks in a model, each once."""
    found = [m._hb_trunk for m in model.modules() if isinstance(m, ConvertedLayer)]
    return [trunk for trunk in dict.fromkeys(found) if trunk is not None]


def chains(model: nn.Module) -> Iterator[ResidualChain | ShardedChain | Trunk]:
    """Every chain in a model, those of converted trunks included."""
    yield from (m for m in model.modules() if isinstance(m, ResidualChain | ShardedChain))
    yield from trunks(model)


def sharded_chains(model: nn.Module) -> list[ShardedChain]:
    """The chains of a model whose layers are spread over processes."""
    return [chain for chain in chains(model) if isinstance(chain, ShardedChain)]


def method_state(model: nn.Module) -> list[dict[str, Any]]:
    """The estimates of gamma of every chain, as plain values for a checkpoint."""
    return [chain.gammas.state_dict() for chain in chains(model)]


def load_method_state(model: nn.Module, state: list[dict[str, Any]]) -> None:
    """Restore what `method_state` returned.

    Raises:
        TypeError: ``state`` is no list of dictionaries.
        ValueError: the model has another number of chains.
    """
    found = list(chains(model))
    if not isinstance(state, list | tuple) or not all(isinstance(s, dict) for s in state):
        raise TypeError(f"state={str(state)[:60]}; expected what method_state returned")
    if len(found) != len(state):
        raise ValueError(f"state of {len(state)} chains; expected {len(found)}, the model's")
    for chain, values in zip(found, state, strict=True):
        chain.gammas.load_state_dict(values)
