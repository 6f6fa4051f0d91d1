"""Made-up data of the shape that a preset trains on: for checks and times without the real data."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from experiments.data.images import ImageData
from experiments.data.pairs import LABELS, PairData
from experiments.data.text import TextData
from experiments.identity import KINDS

Data = ImageData | TextData | PairData


def surrogate(data: DictConfig, rows: int = 2048) -> Data:
    """Random images, tokens or sentence pairs, ``rows`` of each, for the data of a configuration.

    Raises:
        ValueError: data of another kind.
    """
    kind, random = KINDS.get(data._target_), torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=random)

    if kind in ("images", "digits", "image_folder"):
        classes, size = data.get("classes", 10), data.get("size", 32)
        x, y = whole(256, rows, 3, size, size).to(torch.uint8), whole(classes, rows)
        middle = (0.5, 0.5, 0.5)
        return ImageData("surrogate", x, y, x, y, classes, middle, middle, False, False)
    if kind in ("text", "topics"):
        tokens = whole(data.vocabulary, rows * (data.length + 1)).to(torch.int16)
        return TextData("surrogate", tokens, tokens, data.vocabulary, data.length, len(tokens))
    if kind in ("pairs", "grammar"):
        pairs = torch.stack([whole(100, rows, data.length) + 2, whole(2, rows, data.length)], 1)
        y = whole(len(LABELS), rows)
        return PairData("surrogate", pairs.int(), y, pairs.int(), y, 50_265, 1)
    raise ValueError(f"data of kind {data._target_}; expected images, text or pairs")
