"""Image classification data: one dataclass, and its loader for data sets in the hub's layout."""

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from experiments.data import source
from experiments.data.batches import TrainBatches, eval_batches
from experiments.data.cache import Tensors, cache_key, cached, default_cache_dir
from experiments.errors import UserError
from experiments.tasks import Classification

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 32  # pixels a side
FORMAT = 1  # raise it when the decoding below changes: old cache files are then left alone
SPLIT_SEED = 2023  # of the validation split: the same images whatever the run's seed
CHUNK = 2048  # images decoded at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
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

    def train_batches(self, batch_size: int, seed: int, device: torch.device | str) -> TrainBatches:
        return TrainBatches(self, batch_size, seed, device)

    def eval_batches(
        self, batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return eval_batches(self, batch_size, device)


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
    each split (None: any). Labels are integers in 0..classes-1, or strings, numbered in sorted
    order. validation: see `hold_out`. cache_dir: where decoded tensors are kept.

    Raises UserError for a missing, half-written or damaged file, a wrong number of rows, an image
    that does not decode, labels that do not fit `classes`, and when there is neither a local copy
    nor a network.
    """
    splits, rows = list(splits), dict(rows) if rows else None
    settings = dict(
        format=FORMAT,
        name=name,
        config=config,
        splits=splits,
        rows=rows,
        classes=classes,
        image_column=image_column,
        label_column=label_column,
    )
    folder = source.local_folder(root, name)
    if folder is None:
        dataset = source.load_hub(name, config, root)
        files = [Path(file["filename"]) for part in dataset.values() for file in part.cache_files]
    else:
        dataset = None  # a cached local data set is never opened
        files = source.checked_files(folder, config, splits)

    def build() -> Tensors:
        log.info("decoding %s once; the tensors are kept for the next run", name)
        with TemporaryDirectory() as scratch:
            found = dataset or source.load_local(folder, config, files, scratch)
            source.check_rows(found, splits, rows)
            return _decode(found, splits, image_column, label_column, classes)

    place = Path(cache_dir) if cache_dir else default_cache_dir()
    stem = name.replace("/", "--")
    tensors = cached(place / f"{stem}-{cache_key(files, settings)}.pt", build)
    mean, std = tensors.pop("mean"), tensors.pop("std")
    data = ImageData(
        name=name,
        classes=classes,
        augment=augment,
        flip=flip,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        **tensors,
    )
    return hold_out(data, validation)


def hold_out(data: ImageData, validation: int) -> ImageData:
    """The last `validation` images of a fixed permutation of train become the test images.

    So settings can be chosen without a look at the real test set (CIFAR-10: 45k/5k). Mean and
    std stay those of the whole training set, as they are at the final run. 0 leaves data as it is.
    """
    total = len(data.train_labels)
    if not 0 <= validation < total:
        raise UserError(f"data.validation: {validation}; give 0 (off) up to {total - 1} images")
    if validation == 0:
        return data
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    kept, held = order[:-validation], order[-validation:]
    return replace(
        data,
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, float64 (3,), of uint8 images (N, 3, H, W).

    Exact: from the counts of the 256 values. White is 1.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    return mean, (share @ values.square() - mean.square()).sqrt()


def _decode(
    dataset: "Mapping[str, Dataset]",
    splits: Sequence[str],
    image_column: str,
    label_column: str,
    classes: int,
) -> Tensors:
    tensors = {}
    numbers = None
    for role, split in zip(("train", "test"), splits, strict=True):
        rows = dataset[split]
        for key, column in (("image", image_column), ("label", label_column)):
            if column not in rows.column_names:
                raise UserError(
                    f"data.{key}_column: {column!r} is not a column; there are {rows.column_names}"
                )
        labels = rows[label_column][:]
        numbers = numbers or _numbering(labels, classes)
        tensors[f"{role}_labels"] = _number(labels, numbers, split)
        tensors[f"{role}_images"] = _decode_images(rows, image_column, split)
    tensors["mean"], tensors["std"] = channel_statistics(tensors["train_images"])
    return tensors


def _numbering(labels: list, classes: int) -> dict[object, int]:
    """Label -> number: integers are their own, strings are numbered in sorted order."""
    if not isinstance(labels[0], str):
        return {number: number for number in range(classes)}
    names = sorted(set(labels))
    if len(names) != classes:
        raise UserError(f"data.classes: {classes}, but the training split has {len(names)} labels")
    return {name: number for number, name in enumerate(names)}


def _number(labels: list, numbers: Mapping[object, int], split: str) -> Tensor:
    """int64 (N,)"""
    unknown = [row for row, label in enumerate(labels) if label not in numbers]
    if unknown:
        raise UserError(
            f"split {split!r}, row {unknown[0]}: label {labels[unknown[0]]!r} is none of the "
            f"{len(numbers)} classes of the training split (data.classes)"
        )
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def _decode_images(rows: "Dataset", column: str, split: str) -> Tensor:
    """uint8 (N, 3, 32, 32)"""
    from datasets import Image as ImageFeature

    rows = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    images = np.empty((len(rows), 3, SIZE, SIZE), dtype=np.uint8)

    def decode(row: int, encoded: bytes | None) -> None:
        images[row] = _decode_one(encoded, row, split).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        for start in range(0, len(rows), CHUNK):
            cells = rows[start : start + CHUNK][column]
            encoded = [cell["bytes"] for cell in cells]
            list(pool.map(decode, range(start, start + len(cells)), encoded))
    return torch.from_numpy(images)


def _decode_one(encoded: bytes | None, row: int, split: str) -> np.ndarray:
    """uint8 (32, 32, 3)"""
    try:
        image = np.asarray(Image.open(io.BytesIO(encoded or b"")).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"split {split!r}, row {row}: the image does not decode ({type(error).__name__}); "
            f"the file is damaged: download the split again"
        ) from error
    if image.shape != (SIZE, SIZE, 3):
        height, width = image.shape[:2]
        raise UserError(
            f"split {split!r}, row {row}: the image is {width}x{height} pixels, 32x32 expected"
        )
    return image
