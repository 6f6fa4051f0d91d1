"""The interface of a data set to the trainer, and the order of the rows in training."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.tasks import Task

Batch = tuple[Tensor, Tensor]
Device = torch.device | str


class TrainBatches(ABC):
    """Endless batches: each epoch is a permutation of the rows, less its last partial batch.

    Raises UserError if ``batch_size`` is below 1 or above ``total``, the number of rows.
    """

    def __init__(self, total: int, batch_size: int, seed: int, device: Device = "cpu") -> None:
        if not 1 <= batch_size <= total:
            raise UserError(f"batch_size: {batch_size}; give 1 up to {total}, the training rows")
        self.steps_per_epoch = total // batch_size
        self._total, self._batch_size, self._seed, self._device = total, batch_size, seed, device
        self._epoch, self._order = -1, torch.empty(0)  # the permutation last used

    def rows(self, step: int) -> Tensor:
        """Return the rows of step >= 0, int64 (B,) on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self._total, generator=generator_for("epoch", self._seed, epoch))
            self._epoch, self._order = epoch, order.to(self._device)
        return self._order[position * self._batch_size :][: self._batch_size]

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return x and y of step >= 0, functions of seed and step only: resuming needs no state."""


class Data(Protocol):
    """What the loaders named in ``configs/data`` return."""

    name: str

    @property
    def task(self) -> Task:
        """Loss and scores."""

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model that follow from the data, such as the number of classes."""

    def train_batches(self, batch_size: int, seed: int, device: Device) -> TrainBatches:
        """Return shuffled batches; raise UserError if ``batch_size`` does not fit the data."""

    def eval_batches(self, batch_size: int, device: Device) -> Iterable[Batch]:
        """All test rows once, in the same order every time."""


def generator_for(purpose: str, seed: int, index: int) -> torch.Generator:
    """Return a generator seeded with a hash of all three: nearby seeds give unrelated numbers."""
    digest = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class TensorData(ABC):
    """Base class of data sets that are held in tensors; it makes their batches."""

    @abstractmethod
    def rows(self, train: bool, device: Device) -> Batch:
        """x (N, ...) and y (N, ...): all training rows, or all test rows."""

    @abstractmethod
    def batch(self, x: Tensor, y: Tensor, device: Device, random: torch.Generator | None) -> Batch:
        """Make the model's batch of these rows; random: a generator in training, else None."""

    def train_batches(self, batch_size: int, seed: int, device: Device) -> TrainBatches:
        return _TensorBatches(self, batch_size, seed, device)

    def eval_batches(self, batch_size: int, device: Device) -> Iterable[Batch]:
        x, y = (rows.split(batch_size) for rows in self.rows(False, device))
        return (self.batch(*rows, device, None) for rows in zip(x, y, strict=True))


class _TensorBatches(TrainBatches):
    def __init__(self, data: TensorData, batch_size: int, seed: int, device: Device) -> None:
        self._data, self._to = data, device
        self._x, self._y = data.rows(True, device)
        super().__init__(len(self._x), batch_size, seed, self._x.device)

    def batch(self, step: int) -> Batch:
        rows, random = self.rows(step), generator_for("augment", self._seed, step)
        return self._data.batch(self._x[rows], self._y[rows], self._to, random)
