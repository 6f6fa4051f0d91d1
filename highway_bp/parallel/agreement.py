"""What the processes of a sharded model have to agree on, told from rank to rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from highway_bp.parallel.ranks import Ranks, description

NEAR = 1e-3  # of the sum of absolute values: other batches differ by more, rounding by far less


def call_of(x: Tensor, method: object, sizes: list[int], micro_batches: int) -> str:
    """How a chain is called: where processes differ, one would wait for another for ever."""
    mode = "" if torch.is_grad_enabled() else ", without gradients"
    return (
        f"a state of {description(x)}, {method}, sizes={sizes}, micro_batches={micro_batches}{mode}"
    )[:400]


def digest(x: Tensor) -> str:
    """Two numbers that tell one batch's state from another's."""
    x = x.detach().double()
    return f"{x.sum().item()!r} {x.abs().sum().item()!r}"


def check_call(ranks: Ranks, mine: str, theirs: str) -> None:
    """Raise ValueError, naming both, where this rank was called otherwise than the one before."""
    if mine != theirs:
        raise ValueError(
            f"a ShardedChain called on rank {ranks.rank} with {mine}, on rank "
            f"{ranks.rank - 1} with {theirs}; expected the same"
        )


def check_state(ranks: Ranks, mine: str, theirs: str) -> None:
    """Raise ValueError where another state enters the chain than on the rank before."""
    (a, size), (b, _) = (map(float, text.split()) for text in (mine, theirs))
    if abs(a - b) > NEAR * size:
        raise ValueError(
            f"another state enters the ShardedChain on rank {ranks.rank} than on rank "
            f"{ranks.rank - 1} (sums {a:g} and {b:g}); expected the same batch and "
            "the same random numbers on every process"
        )


@torch.no_grad()
def check_weights(ranks: Ranks, model: nn.Module) -> None:
    """Raise ValueError where processes have built different models, before they share layers."""
    mine = [(name, tuple(p.shape), digest(p)) for name, p in model.named_parameters()]
    everyone = ranks.everyone(mine)
    if any(theirs != everyone[0] for theirs in everyone):
        pairs = [(a, b) for theirs in everyone for a, b in zip(everyone[0], theirs, strict=False)]
        name = next((a[0] for a, b in pairs if a != b), "their number")
        raise ValueError(
            f"processes have different models, first in {name}; expected the same "
            "weights everywhere: set torch.manual_seed before building the model"
        )
