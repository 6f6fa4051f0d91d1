"""Bounds and estimates of ||w_i - w_i^k|| from norms alone (docs/theory.md).

With L layers (or groups),

    a_m >= ||J_m + gamma K_m||    c_m >= ||(1 - gamma) K_m||    l_m >= ||J_m + K_m||,  m = 1..L
    b_i  = ||b_i||                r_i  = ||b_i + w_{i+1}^k (J_{i+1} + K_{i+1}) - w_i^k||,  i = 0..L

and lists of them start with m = 1, or with i = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from highway_bp.check import check_whole


def remainder_bound(
    block_norms: Sequence[float],
    carry_norms: Sequence[float],
    b_norms: Sequence[float],
    k: int,
    layer_norms: Sequence[float] | None = None,
) -> list[float]:
    """At least ||w_i - w_i^k||, i = 0..L: all paths through more than k blocks.

    Args:
        block_norms, carry_norms: a_1 .. a_L and c_1 .. c_L.
        b_norms: ||b_0|| .. ||b_L||.
        k: iterations, k >= 0; the bound at state i is 0 from k = L - i on.
        layer_norms: l_1 .. l_L, where known smaller than a_m + c_m.

    Raises:
        ValueError: the lists' lengths do not fit.
    """
    check_whole("k", k, least=0)
    L = len(b_norms) - 1
    if layer_norms is None:
        layer_norms = [a + c for a, c in zip(block_norms, carry_norms, strict=False)]
    if not len(block_norms) == len(carry_norms) == len(layer_norms) == L:
        raise ValueError(
            f"{len(block_norms)} block_norms, {len(carry_norms)} carry_norms and "
            f"{len(layer_norms)} layer_norms for {L + 1} b_norms; expected {L} of each"
        )
    paths = [b_norms[L], *[0.0] * k]  # to this state, by their number of blocks 0..k
    bounds = [0.0]
    for i in reversed(range(L)):
        a, c = block_norms[i], carry_norms[i]
        bounds.append(layer_norms[i] * bounds[-1] + a * paths[k])
        through = [0.0, *(a * p for p in paths[:-1])]
        paths = [c * p + q for p, q in zip(paths, through, strict=True)]
        paths[0] += b_norms[i]
    return bounds[::-1]


def residual_bound(layer_norms: Sequence[float], residual_norms: Sequence[float]) -> list[float]:
    """At least ||w_i - w_i^k||, i = 0..L, for l_1 .. l_L and r_0 .. r_L of w^k."""
    bounds = [residual_norms[-1]]
    for norm, r in zip(reversed(layer_norms), residual_norms[-2::-1], strict=True):
        bounds.append(norm * bounds[-1] + r)
    return bounds[::-1]


def probe_estimate(
    block_gains: Sequence[float], carry_gains: Sequence[float], b_norms: Sequence[float], k: int
) -> list[float]:
    """About ||w_i - w_i^k|| if paths are orthogonal and layers treat all directions alike."""
    squares = ([x * x for x in norms] for norms in (block_gains, carry_gains, b_norms))
    return [math.sqrt(x) for x in remainder_bound(*squares, k)]


def increment_estimate(increments: Sequence[float]) -> float:
    """About ||w - w^k|| from d_m = ||w^m - w^{m-1}||, m = 0..k: d_k (q + q^2 + ...).

    With q = d_k / d_{k-1}: nan with less than two increments, inf where q >= 1.
    """
    if len(increments) < 2:
        return math.nan
    before, last = increments[-2:]
    if last == 0.0:
        return 0.0
    return last * last / (before - last) if last < before else math.inf
