"""Split a batch into micro-batches along a state's first dimension, and join them again."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from highway_bp.containers import leaves, replaced


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
    tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    parts = {id(t): t.split(sizes) for t in tensors if len(t) == sum(sizes) and len(sizes) > 1}
    for m in range(len(sizes)):
        part = {i: of_each[m] for i, of_each in parts.items()}
        yield replaced((args, kwargs), part, copies=True)
