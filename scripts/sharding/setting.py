"""The network and the batch that all strategies train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.errors import UserError
from scripts.transformer_layers import sublayers

HEADS = 4


@dataclass(frozen=True)
class Setting:
    """A transformer of sublayers and its input, the same in every process.

    Attributes:
        layers: number of sublayers, attention and feed-forward in turn.
        width: size of the state's last dimension.
        batch, length: number of examples, and of tokens in each.
        micro_batches: number of parts of the batch, for strategies that use micro-batches.
    """

    layers: int = 24
    width: int = 256
    batch: int = 8
    length: int = 256
    micro_batches: int = 4

    def build(self) -> list[nn.Module]:
        """A new copy of the network, always with the same weights."""
        torch.manual_seed(0)
        return sublayers(self.layers, self.width, HEADS)

    def input(self) -> Tensor:
        """h_0, (batch, length, width)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, self.length, self.width, generator=generator)

    @property
    def state_bytes(self) -> int:
        return 4 * self.batch * self.length * self.width

    @property
    def weight_bytes(self) -> float:
        """Bytes of an average layer's weights."""
        weights = sum(p.numel() for layer in self.build() for p in layer.parameters())
        return 4 * weights / self.layers

    def check(self, processes: int) -> None:
        """Raise UserError if a strategy cannot run on so many processes."""
        M = self.micro_batches
        if self.width % HEADS:
            raise UserError(f"--width {self.width}; expected a multiple of {HEADS}, the heads")
        if not processes <= M <= self.batch:  # 1F1B needs a micro-batch per process
            raise UserError(
                f"--micro-batches {M} with --batch {self.batch} on {processes} processes; expected "
                f"{processes} (processes) to {self.batch} (examples)"
            )
        if self.batch % processes or self.batch % M:
            raise UserError(
                f"--batch {self.batch}; expected a multiple of --processes {processes} "
                f"and of --micro-batches {M}"
            )
        if self.layers < processes:
            raise UserError(
                f"--layers {self.layers} on {processes} processes; expected at least one each"
            )


def loss_of(h: Tensor, target: Tensor | None = None) -> Tensor:
    """The mean square of ``h``; pipelines pass a target to every loss, which is not used."""
    return h.square().mean()
