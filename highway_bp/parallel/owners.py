"""What the processes of a sharded model know of its parameters, brought together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from highway_bp.method_state import sharded_chains

T = TypeVar("T")


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
    sharded = sharded_chains(model)
    if not sharded:
        return dict(values)
    everyone = sharded[0].ranks.everyone(dict(values))
    found = {name: value for theirs in reversed(everyone) for name, value in theirs.items()}
    return {name: found[name] for name, _ in model.named_parameters() if name in found}
