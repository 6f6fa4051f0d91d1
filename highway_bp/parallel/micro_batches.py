"""Split a batch into micro-batches along a state's first dimension, and join them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from highway_bp.caches import is_no_container


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def sizes_of(h: Tensor, micro_batches: int) -> list[int]:
    """Examples per micro-batch, as equal as possible; for a single one, h may have any shape.

    Raises:
        ValueError: fewer examples than micro-batches.
    """
    if micro_batches == 1:
        return [len(h) if h.ndim else 1]
    if h.ndim == 0 or len(h) < micro_batches:
        raise ValueError(
            f"micro_batches={micro_batches} for a state of shape {tuple(h.shape)}; "
            "expected at most one per example, along the first dimension"
        )
    return [len(part) for part in h.tensor_split(micro_batches)]


def arguments_of_each(args: tuple, kwargs: dict, sizes: list[int]) -> Iterator[tuple[tuple, dict]]:
    """The layers' arguments per micro-batch.

    Tensors whose first dimension has one entry per example are cut. Everything else goes to every
    micro-batch unchanged.
    """
    batch, starts = sum(sizes), [sum(sizes[:m]) for m in range(len(sizes))]
    for start, size in zip(starts, sizes, strict=True):

        def its_own(value, start=start, size=size):
            whole = not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch
            return value if whole or size == batch else value[start : start + size]

        yield pytree.tree_map(its_own, (args, kwargs), is_leaf=is_no_container)
