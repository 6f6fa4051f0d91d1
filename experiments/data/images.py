"""Small images for classification: their batches, augmented as in He et al. (2016), and loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.data.batches import Batch, Device, TensorData
from experiments.data.source import concatenated, load_rows, map_cached
from experiments.errors import UserError
from experiments.tasks import Classification

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 32  # pixels a side
SPLIT_SEED = 2023  # of the validation split: the same images for every run's seed
CHUNK = 2048  # images counted at a time
TEST_DIGITS, DIGITS_SEED = 360, 1998  # of 1797 digits; of their split
PADDING = 4  # pixels on every side of an image that is cropped at random


@dataclass(frozen=True)
class ImageData(TensorData):
    """A data set of 32x32 colour images on the CPU.

    train_images, test_images: uint8 (N, 3, 32, 32); train_labels, test_labels: int64 (N,) in
    0..classes-1; mean, std: per channel over the training images, in units where white is 1;
    augment: crop at random in training; `flip`: then also mirror half of the images.
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
    """
    if rows is not None and not {*splits} <= rows.keys():
        raise UserError(f"data.rows={rows}; expected numbers for {', '.join(splits)}, or null")
    found = []
    for split in splits:
        expected = None if rows is None else rows[split]
        columns = (image_column, label_column)
        part = load_rows(name, config, split, columns, root, cache_dir, expected)
        images = _images(part, image_column, f"{name}, split {split!r}")
        found.append((images, _labels(part[label_column][:], classes)))
    return image_data(name, *found, classes, validation, augment, flip)


def load_digits(augment: bool = False, validation: int = 0) -> ImageData:
    """The 1797 digits, 8x8 grey, enlarged bilinearly to three equal channels of 32x32.

    A fixed split: 1437 to train, 360 to test. augment: random crops (digits are never mirrored).
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    grey = torch.from_numpy(digits.images.astype(np.float32)) * (255 / 16)  # (N, 8, 8), 0..255
    large = F.interpolate(grey[:, None], size=(SIZE, SIZE), mode="bilinear")  # (N, 1, 32, 32)
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    labels = torch.from_numpy(digits.target.astype(np.int64))  # (N,)

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(DIGITS_SEED))
    train, test = order[:-TEST_DIGITS], order[-TEST_DIGITS:]
    splits = [(images[rows], labels[rows]) for rows in (train, test)]
    return image_data("digits", *splits, 10, validation, augment, False)


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


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) -> float32; mean, std: of each channel, in units where white is 1."""
    mean, std = _pixel_statistics(mean, std, images.device)
    return images.float().sub_(mean).div_(std)


@cache  # so that only the first batch waits for a transfer
def _pixel_statistics(mean: tuple, std: tuple, device: torch.device) -> Tensor:
    """Return float32 (2, C, 1, 1), in units where white is 255."""
    return (255 * torch.tensor([mean, std])).to(device)[..., None, None]


def draw(size: int, generator: torch.Generator, flip: bool) -> Tensor:
    """Draw int64 (3, B), always on the CPU: mirrored (0 or 1), top and left (0..8)."""
    offsets = torch.randint(2 * PADDING + 1, (2, size), generator=generator)
    return torch.cat([torch.randint(2, (1, size), generator=generator) * int(flip), offsets])


def mirror_and_crop(x: Tensor, drawn: Tensor) -> Tensor:
    """Normalised images (B, C, H, W), mirrored, padded with the mean colour and cropped back."""
    height, width = x.shape[-2:]
    mirrored, top, left = drawn.to(x.device, non_blocking=True)  # one transfer
    x = torch.where(mirrored.bool()[:, None, None, None], x.flip(-1), x)
    padded = F.pad(x, (PADDING,) * 4)  # (B, C, H+8, W+8)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    samples = torch.arange(len(x), device=x.device)
    return windows[samples, :, top, left]  # (B, C, H, W)


def _labels(labels: list, classes: int) -> Tensor:
    """int64 (N,)"""
    for unknown in set(labels) - {*range(classes)}:
        raise UserError(
            f"data.classes: {classes}; the label {unknown!r} is none of 0..{classes - 1}"
        )
    return torch.tensor(labels, dtype=torch.int64)


def _images(rows: Dataset, column: str, place: str) -> Tensor:
    """uint8 (N, 3, 32, 32)"""
    from datasets import Image

    rows = rows.cast_column(column, Image(mode="RGB"))
    found = map_cached(rows, _decoded, f"decoding {place}", column=column, place=place)
    return concatenated(found, "pixels").view(-1, 3, SIZE, SIZE)


def _decoded(batch: Mapping[str, list], column: str, place: str) -> dict[str, np.ndarray]:
    for image in batch[column]:
        if image.size != (SIZE, SIZE):
            width, height = image.size
            raise UserError(f"{place}: an image is {width}x{height} pixels, {SIZE}x{SIZE} expected")
    pixels = np.stack([np.asarray(image) for image in batch[column]]).transpose(0, 3, 1, 2)
    return {"pixels": pixels.reshape(len(pixels), -1)}
