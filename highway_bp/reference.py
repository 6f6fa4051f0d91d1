"""The paper's formulas as they are printed, for reading and for tests; nothing here is fast.

States are 0 .. L, gradients are row vectors. ``J[i]`` and ``K[i]`` are the matrices of block and
carry between states i+1 and i; ``b[i]`` is the gradient of the losses that read state i directly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from highway_bp.carry import Carry


def algorithm_1(v: Sequence[Tensor], K: Sequence[Tensor | Carry]) -> list[Tensor]:
    """CumSumProd(v, K) in log2 n rounds (paper, Algorithm 1; Hillis & Steele 1986).

    Args:
        v: n row vectors; K: n - 1 matrices, or anything with ``w @ K`` and ``K @ K``.
    """
    u, P, n, step = list(v), list(K), len(v), 1
    while step < n:  # P[i] carries index i + step to i
        u = [u[i] + u[i + step] @ P[i] if i + step < n else u[i] for i in range(n)]
        P = [P[i + step] @ P[i] for i in range(max(n - 2 * step, 0))]
        step *= 2
    return u


def highway(J: Sequence[Tensor], K: Sequence[Tensor], b: Sequence[Tensor], k: int) -> list[Tensor]:
    """w^k of Highway-BP (paper, Theorem 2), the gradients of all states after k iterations."""
    w_0 = w = algorithm_1(b, K)  # w^0 = CumSumProd(b, K)
    for _ in range(k):
        v = [*(w[i + 1] @ J[i] for i in range(len(J))), torch.zeros_like(b[-1])]  # v = w^k J
        u = algorithm_1(v, K)
        w = [w_0[i] + u[i] for i in range(len(b))]  # w^{k+1} = w^0 + u
    return w
