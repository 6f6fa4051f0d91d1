"""Which layers each process runs."""

from __future__ import annotations

from collections.abc import Sequence


def shares_of(L: int, P: int, sizes: Sequence[int] | None = None) -> list[range]:
    """The layers of every process; ValueError where they cannot be shared out."""
    if sizes is None:
        if L < P:
            raise ValueError(f"{P} processes for {L} layers; expected at most one per layer")
        sizes = [L // P + (r < L % P) for r in range(P)]
    if len(sizes) != P or sum(sizes) != L or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}; expected {P} numbers of at least 1, {L} in all")
    ends = [sum(sizes[: r + 1]) for r in range(P)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
