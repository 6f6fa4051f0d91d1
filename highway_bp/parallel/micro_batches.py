"""One rank's layers on the micro-batches of a batch, and the whole they make up.

Examples follow one another along a state's first dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from highway_bp.carry import Carry, Diagonal, Identity, Scalar
from highway_bp.chain import is_no_container
from highway_bp.segment import Segment


class MicroBatches:
    """The segments of all micro-batches, as one `Segment` of the whole batch.

    Args:
        parts: the same layers on one micro-batch after the other.
    """

    def __init__(self, parts: Sequence[Segment]):
        self.parts = parts
        self.split = parts[0].split
        self.h_in = joined([part.h_in.detach() for part in parts])
        self.h_in.requires_grad_(parts[0].h_in.requires_grad)
        self.h_out = self.state(-1)

    def __len__(self) -> int:
        """Layers."""
        return len(self.parts[0].states)

    def state(self, i: int) -> Tensor:
        """What layer ``i`` has returned, without its graph."""
        return joined([part.states[i].detach() for part in self.parts])

    def of_each(self, v: Tensor | None) -> Sequence[Tensor | None]:
        """A cotangent of the whole batch, cut into views for its micro-batches."""
        if v is None or len(self.parts) == 1:
            return [v] * len(self.parts)
        return v.split([len(part.h_in) for part in self.parts])

    def vjp(self, w: Tensor) -> Tensor | None:
        """As `Segment.vjp`."""
        return self._whole(
            [part.vjp(w_m) for part, w_m in zip(self.parts, self.of_each(w), strict=True)]
        )

    def inner_cotangent(self, b: Sequence[Tensor | None]) -> Tensor | None:
        """As `Segment.inner_cotangent`."""
        return self._whole(
            [
                part.inner_cotangent(b_m)
                for part, b_m in zip(self.parts, self.cotangents_of_each(b), strict=True)
            ]
        )

    def cotangents_of_each(self, b: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Of every micro-batch those of its states."""
        cut = [self.of_each(c) for c in b]
        return [[c[m] for c in cut] for m in range(len(self.parts))]

    def carry(self) -> Carry:
        """K of the whole batch."""
        return stacked(
            [part.carry() for part in self.parts], [len(part.h_out) for part in self.parts]
        )

    def _whole(self, v: list[Tensor | None]) -> Tensor | None:
        if all(v_m is None for v_m in v):
            return None
        return joined(
            [
                torch.zeros_like(part.h_in) if v_m is None else v_m
                for part, v_m in zip(self.parts, v, strict=True)
            ]
        )


class Stacked(Carry):
    """Of every micro-batch its own K, on ``sizes`` examples each."""

    def __init__(self, carries: Sequence[Carry], sizes: Sequence[int]):
        self.carries, self.sizes = carries, list(sizes)

    def vecmat(self, w: Tensor) -> Tensor:
        pairs = zip(self.carries, w.split(self.sizes), strict=True)
        return joined([K.vecmat(w_m) for K, w_m in pairs])


def stacked(carries: Sequence[Carry], sizes: Sequence[int]) -> Carry:
    """The carry of all micro-batches, in closed form where it is the identity or a number."""
    first = carries[0]
    if len(carries) == 1 or all(isinstance(K, Identity) for K in carries):
        return first
    if all(isinstance(K, Scalar) for K in carries) and len({float(K.s) for K in carries}) == 1:
        return first
    if all(isinstance(K, Diagonal) and len(K.d) == n for K, n in zip(carries, sizes, strict=True)):
        return Diagonal(torch.cat([K.d for K in carries]))
    return Stacked(carries, sizes)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def sizes_of(h: Tensor, micro_batches: int) -> list[int]:
    """Examples per micro-batch, as equal as can be; of a batch left whole, nothing is asked.

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

    Tensors with an entry per example along their first dimension are cut; all else goes to every
    micro-batch as it is.
    """
    batch, starts = sum(sizes), [sum(sizes[:m]) for m in range(len(sizes))]
    for start, size in zip(starts, sizes, strict=True):

        def its_own(value, start=start, size=size):
            whole = not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch
            return value if whole or size == batch else value[start : start + size]

        yield pytree.tree_map(its_own, (args, kwargs), is_leaf=is_no_container)
