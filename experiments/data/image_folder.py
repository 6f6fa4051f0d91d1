"""Images in folders, one folder per class, as ImageNet is kept; decoded while training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from experiments.data.batches import generator_for
from experiments.errors import UserError
from experiments.tasks import Classification

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everybody uses them
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Sample = tuple[Path, int]


@dataclass(frozen=True)
class FolderData:
    """Files and labels of both splits; ``size``: of the square that the model sees, in pixels."""

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    classes: int
    size: int
    workers: int

    def model_arguments(self) -> dict[str, int]:
        return {"classes": self.classes}

    @property
    def task(self) -> Classification:
        return Classification()

    def train_batches(
        self, batch_size: int, seed: int, device: torch.device | str
    ) -> FolderBatches:
        return FolderBatches(self, batch_size, seed, device)

    def eval_batches(
        self, batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """In order: the shorter side at size * 8/7, the middle cut out; x float32, y int64."""
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(self.test), batch_size):
                chosen = self.test[start : start + batch_size]
                images = pool.map(lambda sample: _middle(_decoded(sample[0]), self.size), chosen)
                labels = torch.tensor([label for _, label in chosen])
                yield _normalised(list(images), device), labels.to(device)


class FolderBatches:
    """Shuffled batches of random crops: batch t is a pure function of (seed, t).

    While batch t is used, batch t + 1 is decoded. Raises UserError if `batch_size` does not fit.
    """

    def __init__(
        self, data: FolderData, batch_size: int, seed: int, device: torch.device | str
    ) -> None:
        total = len(data.train)
        if not 1 <= batch_size <= total:
            raise UserError(f"batch_size: {batch_size}; give 1 up to {total}, the training images")
        self.steps_per_epoch = total // batch_size
        self._data, self._batch_size, self._seed, self._device = data, batch_size, seed, device
        self._pool = ThreadPoolExecutor(data.workers)
        self._started: dict[int, list[Future]] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x float32 (B, 3, size, size), normalised and augmented, and y int64 (B,)."""
        labels = torch.tensor([self._data.train[i][1] for i in self._rows(step)])
        images = self._start(step)
        self._started = {step + 1: self._start(step + 1)}
        done = [image.result() for image in images]
        return _normalised(done, self._device), labels.to(self._device)

    def _start(self, step: int) -> list[Future]:
        if step in self._started:
            return self._started[step]
        generator = generator_for("augment", self._seed, step)
        draws = torch.rand(self._batch_size, 5, generator=generator).tolist()
        files = [self._data.train[i][0] for i in self._rows(step)]
        return [
            self._pool.submit(_random_crop, file, self._data.size, draw)
            for file, draw in zip(files, draws, strict=True)
        ]

    def _rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self._seed, epoch, len(self._data.train))
        return order[position * self._batch_size :][: self._batch_size].tolist()


@lru_cache(maxsize=2)  # this epoch's, and the next one's while it begins
def _order(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=generator_for("epoch", seed, epoch))


def load_image_folder(
    root: str | None, train: str = "train", test: str = "val", size: int = 224, workers: int = 8
) -> FolderData:
    """``root``/``train``/CLASS/*.jpg and ``root``/``test``/CLASS/*.jpg.

    Raises UserError for a missing folder, a split without images, and classes of the test split
    that the training split does not have.
    """
    if root is None or not Path(root).is_dir():
        raise UserError(
            f"data.root: {root!r} is not a folder; give the one that holds {train}/ and {test}/, "
            "with a folder of images for every class in each"
        )
    names = sorted(p.name for p in (Path(root) / train).glob("*") if p.is_dir())
    return FolderData(
        Path(root).name,
        _samples(Path(root) / train, names),
        _samples(Path(root) / test, names),
        len(names),
        size,
        workers,
    )


def _samples(folder: Path, names: list[str]) -> list[Sample]:
    unknown = sorted({p.name for p in folder.glob("*") if p.is_dir()} - set(names))
    if unknown:
        raise UserError(f"{folder}: the classes {unknown[:3]} are not in the training split")
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise UserError(f"{folder}: no images in folders of classes ({', '.join(EXTENSIONS)})")
    return found


def _decoded(file: Path):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file}: not an image ({error}); delete it or copy it again") from error


def _random_crop(file: Path, size: int, draw: Sequence[float]) -> Tensor:
    """8 to 100 % of the area, sides 3:4 to 4:3, mirrored half of the time (Szegedy et al. 2015)."""
    image = _decoded(file)
    W, H = image.size
    area = (0.08 + 0.92 * draw[0]) * W * H
    ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    w, h = min(W, round(math.sqrt(area * ratio))), min(H, round(math.sqrt(area / ratio)))
    left, top = round(draw[2] * (W - w)), round(draw[3] * (H - h))
    pixels = _pixels(image.resize((size, size), box=(left, top, left + w, top + h)))
    return pixels.flip(-1) if draw[4] < 0.5 else pixels


def _middle(image, size: int) -> Tensor:
    W, H = image.size
    side = min(W, H) * 7 / 8
    left, top = (W - side) / 2, (H - side) / 2
    return _pixels(image.resize((size, size), box=(left, top, left + side, top + side)))


def _pixels(image) -> Tensor:
    """uint8 (3, size, size)."""
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def _normalised(images: list[Tensor], device: torch.device | str) -> Tensor:
    mean, std = (255 * torch.tensor([MEAN, STD])).to(device)[..., None, None]
    return torch.stack(images).to(device).float().sub_(mean).div_(std)
