"""CumSumProd (paper, section 3 and Algorithm 1): cotangents carried along the residual path.

    CumSumProd(v, K)_i = sum_{j >= i} v_j K_{j-1} ... K_i

with row vectors v_0 .. v_{n-1} and ``K[i]`` the factor that carries index i+1 to i (the paper's
P_i before the first doubling). Equivalently u_{n-1} = v_{n-1}, u_i = v_i + u_{i+1} K[i].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from highway_bp.carry import Carry, Diagonal, Identity, Scalar, as_carry

Carries = None | float | Tensor | Sequence[Carry]


def cumsumprod(
    v: Tensor | Sequence[Tensor], K: Carries = None, algorithm: str = "auto"
) -> Tensor | list[Tensor]:
    """Solve u_i = v_i + u_{i+1} K[i] for all i.

    Args:
        v: stacked cotangents (n, ...), or a list of n tensors (shapes may differ where the
            carries map between them).
        K: None (identity), a number, diagonals (n-1, ...) broadcasting to ``v[1:]``, or a list of
            n-1 carries; ``K[i]`` carries index i+1 to i.
        algorithm: "sequential" (n-1 dependent steps, the reference), "hillis_steele" (the paper's
            Algorithm 1, log2 n steps), "blocked" (about 2 sqrt(n) steps, stacked v and scalar or
            diagonal K only), or "auto".

    Returns:
        u, the same container as v. All algorithms are differentiable in v and diagonal K.

    Raises:
        ValueError: unknown algorithm, wrong number of carries, or shapes that do not fit.
    """
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}; expected one of {', '.join(_ALGORITHMS)}")
    if len(v) == 0:
        raise ValueError("v is empty; expected at least one cotangent")
    return _ALGORITHMS[algorithm](v, _check_carries(v, K))


def scan_(
    v: list[Tensor | None], K: Sequence[Carry], scales: Sequence[float] | None = None
) -> list[Tensor | None]:
    """The sequential scan on a list, in place, of scales[i] K[i]; None stands for zero."""
    for i in reversed(range(len(K))):
        w = v[i + 1]
        if w is not None:
            v[i] = K[i].accumulate_(v[i], w, 1.0 if scales is None else scales[i])
    return v


def _sequential(v, K):
    rows = scan_([t.clone() for t in v], _as_list(v, K))
    return torch.stack(rows) if isinstance(v, Tensor) else rows


def _hillis_steele(v, K):
    if isinstance(v, Tensor) and isinstance(K, Tensor):
        return _hillis_steele_stacked(v, K)
    u, P, n, step = list(v), list(_as_list(v, K)), len(v), 1
    while step < n:  # P[i] carries index i + step to i
        u = [u[i] + P[i].vecmat(u[i + step]) if i + step < n else u[i] for i in range(n)]
        P = [P[i + step] @ P[i] for i in range(max(n - 2 * step, 0))]
        step *= 2
    return torch.stack(u) if isinstance(v, Tensor) else u


def _hillis_steele_stacked(v: Tensor, P: Tensor) -> Tensor:
    u, n, step = v, len(v), 1
    while step < n:
        u = torch.cat([u[:-step] + u[step:] * P, u[-step:]])
        P = P[step:] * P[: max(n - 2 * step, 0)] if n > 2 * step else P[:0]
        step *= 2
    return u


def _blocked(v, K):
    """Scan inside sqrt(n) blocks side by side, then across blocks, then correct every element."""
    if not (isinstance(v, Tensor) and isinstance(K, Tensor)):
        raise ValueError(
            "algorithm='blocked' needs a stacked v and scalar or diagonal K; "
            "use 'sequential' or 'hillis_steele' for lists of carries"
        )
    n = len(v)
    size = math.isqrt(n - 1) + 1
    blocks = -(-n // size)
    v_b = _pad(v, blocks * size).unflatten(0, (blocks, size))  # (blocks, size, ...)
    K_b = _pad(K, blocks * size).unflatten(0, (blocks, size))
    u, P = [v_b[:, -1]], [K_b[:, -1]]  # P: from the next block's first element to here
    for j in reversed(range(size - 1)):
        u.append(v_b[:, j] + u[-1] * K_b[:, j])
        P.append(P[-1] * K_b[:, j])
    first = [torch.zeros_like(v[0]), u[-1][-1]]  # the solved first element of each block, from
    for m in reversed(range(blocks - 1)):  # behind the end to the second block
        first.append(u[-1][m] + first[-1] * P[-1][m])
    after = torch.stack(first[-2::-1])  # (blocks, ...): what enters block m from its right
    solved = torch.stack([u_j + after * P_j for u_j, P_j in zip(u[::-1], P[::-1], strict=True)], 1)
    return solved.flatten(0, 1)[:n]


def _auto(v, K):
    if isinstance(v, Tensor) and K is None:
        return v.flip(0).cumsum(0).flip(0)
    stacked = isinstance(v, Tensor) and isinstance(K, Tensor)
    return (_blocked if stacked and len(v) > 16 else _sequential)(v, K)


_ALGORITHMS: dict[str, Callable] = {
    "auto": _auto,
    "sequential": _sequential,
    "hillis_steele": _hillis_steele,
    "blocked": lambda v, K: _blocked(v, torch.ones_like(v[1:]) if K is None else K),
}


def _pad(t: Tensor, length: int) -> Tensor:
    return torch.cat([t, t.new_zeros(length - len(t), *t.shape[1:])])


def _check_carries(v: Tensor | Sequence[Tensor], K: Carries) -> Tensor | list[Carry] | None:
    n = len(v)
    if K is None:
        return None
    if isinstance(K, int | float):
        if not isinstance(v, Tensor):
            return [Scalar(K)] * (n - 1)
        return torch.full((n - 1, *[1] * (v.ndim - 1)), float(K), dtype=v.dtype, device=v.device)
    if len(K) != n - 1:
        raise ValueError(f"K has {len(K)} carries; expected {n - 1}, one less than v's {n}")
    if isinstance(K, Tensor):
        if isinstance(v, Tensor):
            K = K.reshape(n - 1, *[1] * (v.ndim - K.ndim), *K.shape[1:])
        for i in range(min(n - 1, 1) if isinstance(v, Tensor) else n - 1):  # stacked: one shape
            as_carry(K[i].detach(), v[i + 1], f"index {i + 1}")
        return K if isinstance(v, Tensor) else [Diagonal(d) for d in K]
    return [
        k if isinstance(k, Carry) else as_carry(k, v[i + 1], f"index {i + 1}")
        for i, k in enumerate(K)
    ]


def _as_list(v, K: Tensor | list[Carry] | None) -> list[Carry]:
    if K is None:
        return [Identity()] * (len(v) - 1)
    return [Diagonal(d) for d in K] if isinstance(K, Tensor) else K
