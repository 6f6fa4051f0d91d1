"""Batches of token sequences."""

import torch
from torch import Tensor

from experiments.data.batches import generator_for
from experiments.errors import UserError


class TextBatches:
    """Shuffled training sequences: batch t is a pure function of (seed, t).

    Sequences of ``length`` tokens follow each other in the text without overlap, so an epoch
    predicts every token once. Raises UserError if `batch_size` does not fit the text.
    """

    def __init__(
        self, tokens: Tensor, length: int, batch_size: int, seed: int, device: torch.device | str
    ) -> None:
        self._x, self._y = windows(tokens.to(device), length)
        total = len(self._x)
        if not 1 <= batch_size <= total:
            raise UserError(f"batch_size: {batch_size}; give 1 up to {total}, the text's sequences")
        self.steps_per_epoch = total // batch_size
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)  # the permutation last used

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x and the token after each of it, y: int64 (B, L), of step >= 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = generator_for("epoch", self._seed, epoch)
            order = torch.randperm(len(self._x), generator=generator)
            self._epoch, self._order = epoch, order.to(self._x.device)
        start = position * self._batch_size
        chosen = self._order[start : start + self._batch_size]
        return self._x[chosen].long(), self._y[chosen].long()


def windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Views (n, L) of tokens (N,), and of the tokens one later; N > L."""
    n = (len(tokens) - 1) // length
    return tokens[: n * length].view(n, length), tokens[1 : n * length + 1].view(n, length)
