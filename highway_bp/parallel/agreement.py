"""Checks that the processes of a sharded model agree; all run them and raise the same error."""

import torch
from torch import Tensor, nn

from highway_bp.parallel.ranks import Ranks

NEAR = 1e-3  # of the sum of absolute values; other batches differ by more, rounding by far less


def check_call(ranks: Ranks, call: str, h: Tensor | None) -> None:
    """Raise ValueError if ranks call a chain in different ways; one of them would wait for ever.

    Args:
        call: how this rank calls it.
        h: the state that enters the chain here; None: it is not compared.
    """
    calls, sums = zip(*ranks.all_gather_object((call, h if h is None else sums_of(h))), strict=True)
    for rank in range(1, ranks.size):
        if calls[rank] != calls[0]:
            raise ValueError(
                f"a ShardedChain called on rank {rank} with {calls[rank]}, on rank 0 with "
                f"{calls[0]}; expected the same"
            )
        if h is not None and abs(sums[rank][0] - sums[0][0]) > NEAR * sums[0][1]:
            raise ValueError(
                f"rank {rank} passes another state to the ShardedChain than rank 0 (sums "
                f"{sums[rank][0]:g} and {sums[0][0]:g}); expected the same batch and the same "
                "random numbers on every process"
            )


@torch.no_grad()
def check_weights(ranks: Ranks, model: nn.Module) -> None:
    """Raise ValueError if processes have built different models, before they share layers."""
    mine = [(name, tuple(p.shape), sums_of(p)) for name, p in model.named_parameters()]
    everyone = ranks.all_gather_object(mine)
    if any(theirs != everyone[0] for theirs in everyone):
        pairs = [(a, b) for theirs in everyone for a, b in zip(everyone[0], theirs, strict=False)]
        name = next((a[0] for a, b in pairs if a != b), "their number")
        raise ValueError(
            f"processes have different models, first in {name}; expected the same "
            "weights everywhere: set torch.manual_seed before building the model"
        )


def sums_of(t: Tensor) -> tuple[float, float]:
    """The sums of t and of its absolute values; they differ for other batches or weights."""
    t = t.detach().double()
    return t.sum().item(), t.abs().sum().item()
