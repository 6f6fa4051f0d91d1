"""Images in one folder per class, as in ImageNet, decoded during training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import models.torchvision_ops  # noqa: F401, before torchvision
from experiments.data.batches import Batch, Device, TrainBatches, generator_for
from experiments.data.images import normalised
from experiments.errors import UserError
from experiments.tasks import Classification

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, the usual values


@dataclass(frozen=True)
class FolderData:
    """Both splits, and the largest number of processes that decode them."""

    name: str
    train: ImageFolder
    test: ImageFolder
    workers: int

    task: ClassVar[Classification] = Classification()

    def model_arguments(self) -> dict[str, int]:
        return {"classes": len(self.train.classes)}

    def train_batches(self, batch_size: int, seed: int, device: Device) -> FolderBatches:
        return FolderBatches(self, batch_size, seed, device)

    def eval_batches(self, batch_size: int, device: Device) -> Iterator[Batch]:
        """x float32 (B, 3, size, size), the normalised middle of every image; y int64 (B,)."""
        return _batches(self.test, self.workers, device, batch_size=batch_size)


class FolderBatches(TrainBatches):
    """Random crops, mirrored half of the time. Workers decode the next batches meanwhile."""

    def __init__(self, data: FolderData, batch_size: int, seed: int, device: Device) -> None:
        super().__init__(len(data.train), batch_size, seed)
        self._data, self._to = data, device
        self._step = -2  # of the batch returned last; -2: none, and no batch follows it

    def batch(self, step: int) -> Batch:
        """x float32 (B, 3, size, size), normalised; y int64 (B,)."""
        if step == self._step:
            return self._last
        if step != self._step + 1:
            images, workers = _Seeded(self._data.train), self._data.workers
            self._coming = _batches(images, workers, self._to, batch_sampler=self._samples(step))
        self._step, self._last = step, next(self._coming)
        return self._last

    def _samples(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the (row, seed) pairs of a step's images, from step ``first`` on."""
        for step in count(first):
            rows, generator = self.rows(step), generator_for("augment", self._seed, step)
            seeds = torch.randint(2**62, rows.shape, generator=generator)
            yield list(zip(rows.tolist(), seeds.tolist(), strict=True))


class _Seeded(Dataset):
    """Images by row and seed; any process that decodes them gives the same result."""

    def __init__(self, images: ImageFolder) -> None:
        self._images = images

    def __getitem__(self, sample: tuple[int, int]) -> tuple[Tensor, int]:
        row, seed = sample
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._images[row]


def _batches(images: Dataset, workers: int, device: Device, **order: Any) -> Iterator[Batch]:
    loader = DataLoader(
        images,
        num_workers=min(workers, os.cpu_count() or 1),
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # the loader draws a number, but not from the trainer's
        **order,
    )
    try:
        for x, y in loader:
            x, y = (t.to(device, non_blocking=True) for t in (x, y))
            yield normalised(x, MEAN, STD), y
    except UserError as error:  # in a worker's error the text contains a traceback
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _leave_signals_to_the_trainer(_: int) -> None:
    """Leave the group that Ctrl-C reaches: the trainer's last step may need another batch."""
    os.setpgrp()


def load_image_folder(
    root: str | None, train: str = "train", test: str = "val", size: int = 224, workers: int = 8
) -> FolderData:
    """Load ``root``/``train``/CLASS/*.jpg and ``root``/``test``/CLASS/*.jpg.

    size: side of the model's square input, in pixels. Training crops are 8 to 100 % of an image,
    with sides 3:4 to 4:3 (Szegedy et al. 2015). A test image is resized to a shorter side of
    size * 8/7, and its middle is used.
    """
    if root is None or not Path(root).is_dir():
        raise UserError(
            f"data.root: {root!r} is not a folder; give the one that holds {train}/ and {test}/, "
            "with a folder of images for every class in each"
        )
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ToImage()])
    middle = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), v2.ToImage()])
    try:
        training = ImageFolder(Path(root) / train, crop, loader=_decoded)
        scored = ImageFolder(Path(root) / test, middle, loader=_decoded)
    except FileNotFoundError as error:
        raise UserError(f"data.root: {str(error).splitlines()[0]}") from error
    if unknown := sorted(set(scored.classes) - set(training.classes)):
        raise UserError(f"{scored.root}: the classes {unknown[:3]} are not in the training split")
    numbers = [training.class_to_idx[name] for name in scored.classes]
    scored.target_transform = numbers.__getitem__
    return FolderData(Path(root).name, training, scored, workers)


def _decoded(file: str) -> Any:
    """Open the file as a PIL image in RGB."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{file}: not an image ({error}); delete it or copy it again") from error
