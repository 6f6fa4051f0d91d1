"""What a gradient method costs, counted: passes through the blocks of the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

import highway_bp as hb


@dataclass
class Passes:
    """Sums over the steps so far; the pass for the parameters' gradients is not counted.

    Attributes:
        block_passes: through every block: one per iteration, one for backpropagation.
        sequential_passes: those that wait for each other when every layer has a device of its
            own: the same for Highway-BP, L for backpropagation.
    """

    block_passes: int = 0
    sequential_passes: int = 0

    def add(self, model: nn.Module, method: hb.Method) -> int:
        """Count the last backward pass; returns its iterations."""
        L, iterations = hb.chain_length(model), hb.iterations(model)
        if method.groups(1) is None:
            self.block_passes += 1
            self.sequential_passes += L
        else:
            inside = len(next(iter(method.groups(L)), ()))  # layers of a group, one by one
            self.block_passes += iterations
            self.sequential_passes += min(iterations * inside, L)
        return iterations

    def add_measurement(self, model: nn.Module, method: hb.Method, ks: Sequence[int]) -> None:
        """Count a measurement of a schedule: once exact, once with every k."""
        L = hb.chain_length(model)
        inside = len(next(iter(method.groups(L)), ()))
        self.block_passes += 1 + sum(ks)
        self.sequential_passes += L + sum(min(k * inside, L) for k in ks)

    def state_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
