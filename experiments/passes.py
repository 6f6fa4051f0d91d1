"""The cost of a gradient method, counted in passes through the blocks of the chain."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

import highway_bp as hb


@dataclass
class Passes:
    """Sums over the steps so far; the pass for the parameters' gradients is not counted.

    Attributes:
        block_passes: passes through all blocks: one per iteration, one for backpropagation.
        sequential_passes: passes that wait for each other when every layer has a device of its
            own: iterations x group size, at most L; L for backpropagation.
    """

    block_passes: int = 0
    sequential_passes: int = 0

    def add(self, model: nn.Module, method: hb.Method, iterations: int) -> None:
        """Count one backward pass, which took ``iterations`` iterations."""
        sizes = group_sizes(model, method)
        if method.group_size is None:
            iterations, sizes = 1, [sum(sizes)]
        self._add(iterations, sizes)

    def add_measurement(self, model: nn.Module, method: hb.Method, ks: Sequence[int]) -> None:
        """Count a schedule's measurement: one exact gradient, and one gradient for every k."""
        sizes = group_sizes(model, method)
        self._add(1, [sum(sizes)])
        for k in ks:
            self._add(min(k, len(sizes)), sizes)

    def _add(self, iterations: int, sizes: Sequence[int]) -> None:
        """Count iterations in which groups run at once, and the layers of a group one by one."""
        self.block_passes += iterations
        self.sequential_passes += min(iterations * max(sizes), sum(sizes))


def group_sizes(model: nn.Module, method: hb.Method) -> list[int]:
    """Return the number of layers (or time steps) in each group of the longest chain.

    Groups are exact inside. They are the method's; in a sharded chain, each process is a group.
    """
    sharded = [chain for chain in hb.chains(model) if isinstance(chain, hb.ShardedChain)]
    if sharded:
        return [len(share) for share in max(sharded, key=len).shares]
    L = hb.chain_length(model)
    size = method.group_size or L
    return [min(size, L - start) for start in range(0, L, size)]
