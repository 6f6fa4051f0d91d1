"""Characters as tokens: the most frequent ones of the training text."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 20_000  # rows at a time
CODE_POINTS = 0x110000

log = logging.getLogger(__name__)


class Characters:
    """The ``size`` most frequent characters, ties by code point; all others are left out.

    Token 0 is the most frequent. The text is needed in rows, ``file`` is not used.
    """

    def __init__(self, rows: Sequence[str], size: int, file: Path):
        counts = np.zeros(CODE_POINTS, dtype=np.int64)
        for points in _code_points(rows):
            counts += np.bincount(points, minlength=CODE_POINTS)
        order = np.lexsort((np.arange(CODE_POINTS), -counts))
        kept = order[: min(size, np.count_nonzero(counts))]
        self.vocabulary = len(kept)
        self.characters = [chr(point) for point in kept]
        self._token = np.full(CODE_POINTS, -1, dtype=np.int16)
        self._token[kept] = np.arange(len(kept))
        share = 1 - counts[kept].sum() / max(counts.sum(), 1)
        log.info("%d characters; %.4f %% of the training text left out", len(kept), 100 * share)

    def encode(self, rows: Sequence[str]) -> Tensor:
        """uint8 (N,), or int16 if there are more than 256 characters."""
        dtype = np.uint8 if self.vocabulary <= 256 else np.int16
        parts = [np.empty(0, dtype)]
        for points in _code_points(rows):
            tokens = self._token[points]
            parts.append(tokens[tokens >= 0].astype(dtype))
        return torch.from_numpy(np.concatenate(parts))


def _code_points(rows: Sequence[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), CHUNK):
        yield _points(rows[start : start + CHUNK])


def _points(rows: Iterable[str]) -> np.ndarray:
    return np.frombuffer("".join(rows).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
