"""gamma="auto": the share of each layer's carry that leaves the smallest block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from highway_bp.check import check_whole


@dataclass(frozen=True)
class AutoGamma:
    """gamma_i = argmin ||J_i + gamma K_i||_F = -<J_i, K_i> / <K_i, K_i>; -tr(J_i)/d for K = I.

    Estimated from random signs z: <J, K> = E[zJ . zK]. A value may be negative (the block adds to
    the residual path) or above 1. The estimate costs ``probes`` iterations every ``every``
    backward passes.

    Args:
        probes: number of random vectors per layer, at least 1.
        every: number of backward passes from one estimate to the next, at least 1.

    Raises:
        TypeError, ValueError: an argument is not such a number.
    """

    probes: int = 1
    every: int = 100

    def __post_init__(self) -> None:
        check_whole("probes", self.probes, least=1)
        check_whole("every", self.every, least=1)


class GammaMemory:
    """Stores the estimates of one chain between backward passes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Delete all estimates; the next backward pass makes new ones."""
        self.values: dict[str, float] = {}
        self.age = self.estimates = 0

    def values_for(self, auto: AutoGamma, keys: Sequence[str], estimate: Callable) -> list[float]:
        """Return the current values of the layers with these keys.

        Args:
            estimate: ``estimate(probes, seed)`` returns new values. It is called when they are due
                or a layer has none yet.
        """
        if self.age >= auto.every or not self.values.keys() >= set(keys):
            new = estimate(auto.probes, self.estimates)
            self.values |= dict(zip(keys, new, strict=True))
            self.age, self.estimates = 0, self.estimates + 1
        self.age += 1
        return [self.values[key] for key in keys]

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "values": dict(state["values"])})


def smallest_block(
    zJ: Callable[[Tensor], Tensor | None],
    zK: Callable[[Tensor], Tensor],
    like: Tensor,
    probes: int,
    generator: torch.Generator,
) -> float:
    """-<J, K> / <K, K> of one layer; ``like`` has the shape, dtype and device of its output."""
    dot = square = 0.0
    for _ in range(probes):
        z = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        z = (2 * z - 1).to(like.dtype)
        through_block, carried = zJ(z), zK(z).float()
        if through_block is not None:
            dot += torch.sum(through_block.float() * carried).item()
        square += torch.sum(carried * carried).item()
    return -dot / square if square else 0.0
