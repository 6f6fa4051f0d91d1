"""Batches for training and evaluation, from images that already live on the device."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.data.augment import draw, mirror_and_crop
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.data.images import ImageData


class TrainBatches:
    """Shuffled, augmented training batches: batch t is a pure function of (seed, t).

    So a run that is resumed at step t needs no state. Every epoch is a new permutation; what does
    not fill a last batch is left out. Raises UserError if `batch_size` does not fit the data.
    """

    def __init__(
        self, data: "ImageData", batch_size: int, seed: int, device: torch.device | str
    ) -> None:
        total = len(data.train_labels)
        if not 1 <= batch_size <= total:
            raise UserError(f"batch_size: {batch_size}; give 1 up to {total}, the training images")
        self.steps_per_epoch = total // batch_size
        self._batch_size, self._seed, self._device = batch_size, seed, torch.device(device)
        self._images = data.train_images.to(self._device)  # uint8 (N, 3, 32, 32)
        self._labels = data.train_labels.to(self._device)
        self._mean, self._std = _statistics(data, self._device)
        self._augment, self._flip = data.augment, data.flip
        self._epoch, self._order = -1, torch.empty(0)  # the permutation last used

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x float32 (B, 3, 32, 32), normalised and augmented, and y int64 (B,) of step >= 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._batch_size
        chosen = self._permutation(epoch)[start : start + self._batch_size]  # (B,)
        x = _normalise(self._images[chosen], self._mean, self._std)
        if self._augment:
            generator = generator_for("augment", self._seed, step)
            x = mirror_and_crop(x, draw(len(chosen), generator, self._flip, self._device))
        return x, self._labels[chosen]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = generator_for("epoch", self._seed, epoch)
            order = torch.randperm(len(self._labels), generator=generator)
            self._epoch, self._order = epoch, order.to(self._device)
        return self._order


def eval_batches(
    data: "ImageData", batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images in order, once each: x float32 (B, 3, 32, 32) normalised, y int64 (B,)."""
    mean, std = _statistics(data, device)
    for images, labels in zip(
        data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True
    ):
        yield _normalise(images.to(device), mean, std), labels.to(device)


def _statistics(data: "ImageData", device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and std in pixel values, float32 (3, 1, 1) each."""
    mean, std = (255 * torch.tensor([data.mean, data.std])).to(device)[..., None, None]
    return mean, std


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of mean 0 and standard deviation 1 per channel."""
    return images.float().sub_(mean).div_(std)


def generator_for(purpose: str, seed: int, index: int) -> torch.Generator:
    """Nearby (seed, index) give unrelated streams: the generator's seed is a hash of all three."""
    digest = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
