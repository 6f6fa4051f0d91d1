"""Small images for classification, and their loader for data sets in the hub's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from experiments.data.augment import draw, mirror_and_crop, normalised
from experiments.data.batches import Batch, Device, TensorData
from experiments.data.source import flat, load_rows, map_cached
from experiments.errors import UserError
from experiments.tasks import Classification

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 32  # pixels a side
SPLIT_SEED = 2023  # of the validation split: the same images for every run's seed
CHUNK = 2048  # images counted at a time


@dataclass(frozen=True)
class ImageData(TensorData):
    """A data set of 32x32 colour images on the CPU.

    train_images, test_images: uint8 (N, 3, 32, 32); train_labels, test_labels: int64 (N,) in
    0..classes-1; mean, std: per channel over the training images, in units where white is 1;
    augment: random crops are allowed in training, and with `flip` mirrored images too.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: bool
    flip: bool

    task: ClassVar[Classification] = Classification()

    def model_arguments(self) -> dict[str, int]:
        return {"classes": self.classes}

    def rows(self, train: bool, device: Device) -> Batch:
        images = self.train_images if train else self.test_images
        labels = self.train_labels if train else self.test_labels
        return images.to(device), labels.to(device)

    def batch(self, x: Tensor, y: Tensor, device: Device, random: torch.Generator | None) -> Batch:
        """x float32 (B, 3, 32, 32), normalised, augmented in training; y int64 (B,)."""
        x = normalised(x, self.mean, self.std)
        if self.augment and random is not None:
            x = mirror_and_crop(x, draw(len(x), random, self.flip))
        return x, y


def load_hub_images(
    name: str,
    config: str | None = None,
    splits: Sequence[str] = ("train", "test"),
    image_column: str = "image",
    label_column: str = "label",
    classes: int = 10,
    rows: Mapping[str, int] | None = None,
    root: str | None = None,
    validation: int = 0,
    augment: bool = True,
    flip: bool = True,
    cache_dir: str | None = None,
) -> ImageData:
    """Reads `<root>/<name>` if that folder exists, else `name` from the hub; decodes once.

    splits: the names of the training and the test split. rows: the expected number of rows of
    each split (None: any). Labels are integers in 0..classes-1. validation: see `image_data`.
    cache_dir: see `experiments.data.source`.

    Raises UserError as `load_rows` does, for an image that does not decode, and for labels that do
    not fit `classes`.
    """
    found = []
    for split in splits:
        expected = None if rows is None else rows[split]
        columns = (image_column, label_column)
        part = load_rows(name, config, split, columns, root, cache_dir, expected)
        images = _images(part, image_column, f"{name}, split {split!r}")
        found.append((images, _labels(part[label_column][:], classes)))
    return image_data(name, *found, classes, validation, augment, flip)


def image_data(
    name: str, train: Batch, test: Batch, classes: int, validation: int, augment: bool, flip: bool
) -> ImageData:
    """Make an ImageData of both splits, with the mean and std of the training images.

    validation: how many training images, of a fixed permutation, replace the test images. So
    settings can be chosen without the real test set (CIFAR-10: 45k/5k). Mean and std stay those of
    all training images, as in the final run.
    """
    mean, std = channel_statistics(train[0])
    total = len(train[1])
    if not 0 <= validation < total:
        raise UserError(f"data.validation: {validation}; give 0 (off) up to {total - 1} images")
    if validation:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
        kept, held = order[:-validation], order[-validation:]
        train, test = ([tensor[rows] for tensor in train] for rows in (kept, held))
    return ImageData(name, *train, *test, classes, mean, std, augment, flip)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, 3, H, W), where white is 1.

    Exact: from the counts of the 256 values.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share @ values.square() - mean.square()).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _labels(labels: list, classes: int) -> Tensor:
    """int64 (N,)"""
    for unknown in set(labels) - {*range(classes)}:
        raise UserError(
            f"data.classes: {classes}; the label {unknown!r} is none of 0..{classes - 1}"
        )
    return torch.tensor(labels)


def _images(rows: Dataset, column: str, place: str) -> Tensor:
    """uint8 (N, 3, 32, 32)"""
    from datasets import Image

    rows = rows.cast_column(column, Image(mode="RGB"))
    found = map_cached(rows, _decoded, f"decoding {place}", column=column, place=place)
    return flat(found, "pixels").view(-1, 3, SIZE, SIZE)


def _decoded(batch: Mapping[str, list], column: str, place: str) -> dict[str, np.ndarray]:
    for image in batch[column]:
        if image.size != (SIZE, SIZE):
            width, height = image.size
            raise UserError(f"{place}: an image is {width}x{height} pixels, {SIZE}x{SIZE} expected")
    pixels = np.stack([np.asarray(image) for image in batch[column]]).transpose(0, 3, 1, 2)
    return {"pixels": pixels.reshape(len(pixels), -1)}
