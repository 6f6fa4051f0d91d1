"""Sequences of different lengths: padded tensors (L, B, F) with a length per row (B,)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_lengths(lengths: Tensor | Sequence[int], L: int, B: int) -> Tensor:
    """The lengths as int64 (B,) on the CPU, in any order.

    Raises:
        TypeError: they are not whole numbers.
        ValueError: there are not B of them, or one is not in 1 .. L.
    """
    t = torch.as_tensor(lengths, device="cpu")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"lengths are {t.dtype}; expected whole numbers")
    if t.shape != (B,):
        raise ValueError(
            f"lengths have shape {tuple(t.shape)}; expected {B}, one for each sequence"
        )
    for i, n in enumerate(t.tolist()):
        if not 1 <= n <= L:
            raise ValueError(f"lengths[{i}]={n}; expected 1 up to {L}, the steps of the input")
    return t.long()


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (L, B, F) with the first ``lengths`` steps of each row reversed; its own inverse."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]  # (L, 1)
    source = torch.where(t < lengths, lengths - 1 - t, t)  # (L, B)
    return x.gather(0, source[..., None].expand_as(x))


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last step of each row (B, F)."""
    if lengths is None:
        return x[-1]
    return x[lengths - 1, torch.arange(x.shape[1], device=x.device)]
