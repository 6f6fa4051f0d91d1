"""Shares of layers, one for every process, of which the slowest is as fast as can be."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from highway_bp.check import check_whole
from highway_bp.parallel.shares import shares_of


def balanced_sizes(seconds: Sequence[float], P: int) -> list[int]:
    """Cut layers into consecutive shares, of which the one that takes longest takes the least time.

    Args:
        seconds: of every layer, as `layer_seconds` finds them.
        P: processes.

    Returns:
        Layers per process, at least one; where several cuts are as good, the most equal counts,
        larger ones first.

    Raises:
        TypeError, ValueError: P is no whole number from 1 to the number of layers; a time is
            negative or not finite.
    """
    check_whole("P", P, least=1)
    shares_of(len(seconds), P)  # as many layers as processes, at least
    if not all(0 <= s < math.inf for s in seconds):
        raise ValueError(f"seconds={list(seconds)}; expected finite numbers of at least 0")
    # Exact sums: shares that take the same are no better than each other by rounding.
    ends = [Fraction(0), *accumulate(Fraction(float(s)) for s in seconds)]
    bounds = sorted({b - a for i, a in enumerate(ends) for b in ends[i + 1 :]})
    least = bisect_left(bounds, True, key=lambda bound: _shares_needed(ends, bound) <= P)
    return _most_equal(ends, P, bounds[least])


def _shares_needed(ends: Sequence[Fraction], bound: Fraction) -> float:
    """The fewest shares, none above the bound; infinite where a single layer is."""
    count = start = 0
    while start < len(ends) - 1:
        stop = _longest(ends, start, bound)
        if stop == start:
            return math.inf
        count, start = count + 1, stop
    return count


def _longest(ends: Sequence[Fraction], start: int, bound: Fraction) -> int:
    """Where the longest share from a layer on ends that is not above the bound."""
    return bisect_right(ends, bound, start, key=lambda end: end - ends[start]) - 1


def _most_equal(ends: Sequence[Fraction], P: int, bound: Fraction) -> list[int]:
    """Of all cuts into P shares, none above the bound, the one of least squared counts."""
    L = len(ends) - 1
    stops = [_longest(ends, i, bound) for i in range(L)]
    best: dict[int, tuple[int, list[int]]] = {L: (0, [])}  # by first layer: squares, counts below 0
    for _ in range(P):
        longer = {}
        for i in range(L):
            cuts = [
                ((j - i) ** 2 + best[j][0], [i - j, *best[j][1]])
                for j in range(i + 1, stops[i] + 1)
                if j in best
            ]
            if cuts:
                longer[i] = min(cuts)
        best = longer
    return [-n for n in best[0][1]]
