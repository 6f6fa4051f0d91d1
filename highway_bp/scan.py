"""CumSumProd (paper, section 3): cotangents carried along the residual path.

    CumSumProd(v, K)_i = sum_{j >= i} v_j K_{j-1} ... K_i

with row vectors v_0 .. v_{n-1} and ``K[i]`` the factor that carries index i+1 to i (the paper's
P_i before the first doubling). Equivalently u_{n-1} = v_{n-1}, u_i = v_i + u_{i+1} K[i].

`scan_` solves it on a list, `DiagonalScan` on stacked tensors; the paper's Algorithm 1 is in
`reference`, the scan across processes in `parallel.scans`.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from highway_bp.carry import Carry, Diagonal, Scalar, as_carry
from highway_bp.reference import algorithm_1

Carries = None | float | Tensor | Sequence[Carry]
ALGORITHMS = ("auto", "sequential", "hillis_steele", "blocked")
SHORT = 16  # for at most this many cotangents, "auto" is sequential


def cumsumprod(
    v: Tensor | Sequence[Tensor], K: Carries = None, algorithm: str = "auto"
) -> Tensor | list[Tensor]:
    """Solve u_i = v_i + u_{i+1} K[i] for all i (paper, section 3).

    Args:
        v: stacked cotangents (n, ...), or a list of n tensors (shapes may differ where the
            carries map between them).
        K: None (identity), a number or 0-d tensor, diagonals (n-1, ...) broadcasting to ``v[1:]``,
            or a list of n-1 carries; ``K[i]`` carries index i+1 to i.
        algorithm: "sequential" (n-1 dependent steps, the reference), "hillis_steele" (the paper's
            Algorithm 1, log2 n steps; a product of carries that overflows gives NaN), "blocked"
            (about 2 sqrt(n) steps, stacked v and scalar or diagonal K only), or "auto".

    Returns:
        u, a tensor or list like v, of the dtype that v and K promote to. All algorithms are
        differentiable with respect to v and to the scalars and diagonals in K.

            >>> hb.cumsumprod(torch.tensor([1.0, 2.0, 3.0]), 0.5)
            tensor([2.7500, 3.5000, 3.0000])

    Raises:
        TypeError: v is not floating, or a diagonal is neither floating nor bool.
        ValueError: unknown algorithm, wrong number of carries, or shapes that do not fit.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
    if (isinstance(v, Tensor) and v.ndim == 0) or len(v) == 0:
        raise ValueError("v is empty or 0-d; expected at least one cotangent")
    if not isinstance(K, None | int | float | Tensor | Sequence) or isinstance(K, str):
        kind = type(K).__name__
        raise TypeError(f"K is a {kind}; expected a number, diagonals (n-1, ...) or n-1 carries")
    stacked = isinstance(v, Tensor)
    for t in [v] if stacked else v:
        if not t.is_floating_point():
            raise TypeError(f"v has dtype {t.dtype}; expected a floating dtype")
    if stacked and K is None and algorithm == "auto":
        return v.flip(0).cumsum(0).flip(0)
    dtypes = [t.dtype for t in (*([v] if stacked else v), *_diagonals(K))]
    dtype = reduce(torch.promote_types, dtypes)
    v = v.to(dtype) if stacked else [t.to(dtype) for t in v]
    K = _carries(v, K)
    diagonals = isinstance(K, Tensor)
    if algorithm == "blocked" and not diagonals:
        raise ValueError(
            "algorithm='blocked' needs a stacked v and scalar or diagonal K; "
            "use 'sequential' or 'hillis_steele' for lists of carries"
        )
    if diagonals and (algorithm == "blocked" or (algorithm == "auto" and len(v) > SHORT)):
        shape = len(v), math.prod(v.shape[1:])
        K = K.expand_as(v[1:]).reshape(len(K), shape[1])
        return _Blocked.apply(v.reshape(shape), K).view_as(v)
    carries = [Diagonal(d) for d in K] if diagonals else K
    if algorithm == "hillis_steele":
        u = algorithm_1(list(v), carries)
    else:
        u = scan_([t.clone() for t in v], carries)
    return torch.stack(u) if stacked else u


def scan_(
    v: list[Tensor | None], K: Sequence[Carry], scales: Sequence[float] | None = None
) -> list[Tensor | None]:
    """Scan the list v sequentially and in place, by scales[i] K[i]; None in v stands for zero."""
    for i in reversed(range(len(K))):
        w = v[i + 1]
        if w is not None:
            v[i] = K[i].accumulate_(v[i], w, 1.0 if scales is None else scales[i])
    return v


def in_blocks(L: int) -> tuple[int, int]:
    """Return (blocks, size), each about sqrt(L), such that blocks * size >= L + 1."""
    size = math.isqrt(L) + 1
    return -(-(L + 1) // size), size


class DiagonalScan:
    """u_i = v_i + u_{i+1} K_i in place on stacked states, with about 2 sqrt(L) dependent steps.

    First, all blocks are scanned at once; then the first states of the blocks, one after the
    other. Then the other states are corrected by the products of K up to the next block, which are
    kept for the next call. If one overflows, inf * 0 would be NaN: then all states are one block,
    which takes L steps.

    Args:
        K: diagonals (L, B, C); K[i] carries the first C elements of state i+1 to state i.
        scale: factor on every K.
        bounded: |K| <= 1, so no product overflows, and no check makes a GPU wait.
    """

    def __init__(self, K: Tensor, scale: float = 1.0, bounded: bool = False):
        self.blocks, self.size = in_blocks(len(K))
        K = K * scale if scale != 1.0 else K
        K = _pad(K, self.blocks * self.size)
        K = K.unflatten(0, (self.blocks, self.size))
        self._P = K.clone()  # from the first state of the next block to here
        P = self._P.unbind(1)  # each slice is taken once: there are many, and they are small
        for j in reversed(range(self.size - 1)):
            P[j].mul_(P[j + 1])
        if not (bounded or K.is_meta or self._P.isfinite().all()):
            self.blocks, self.size = 1, self.blocks * self.size
            K = self._P = K.flatten(0, 1)[None]
        self._K, self._P_0 = K.unbind(1), self._P[:, 0].unbind(0)

    def __call__(self, v: Tensor) -> Tensor:
        """Scan v (blocks * size, B, S), S >= C, in place; returns it."""
        u = v[..., : self._P.shape[-1]].unflatten(0, (self.blocks, self.size))
        _scan_(u.unbind(1), self._K)
        _scan_(u[:, 0].unbind(0), self._P_0)
        u[:-1, 1:].addcmul_(u[1:, :1], self._P[:-1, 1:])
        return v


def _scan_(u: Sequence[Tensor], K: Sequence[Tensor]) -> None:
    for i in reversed(range(len(u) - 1)):
        u[i].addcmul_(u[i + 1], K[i])


class _Blocked(torch.autograd.Function):
    """`DiagonalScan` on a copy of v (n, m) by K (n-1, m); its gradient is a reversed scan."""

    @staticmethod
    def forward(v, K):
        blocks, size = in_blocks(len(K))
        return DiagonalScan(K)(_pad(v, blocks * size))[: len(v)]

    @staticmethod
    def setup_context(ctx, inputs, u):
        ctx.save_for_backward(u, inputs[1])
        ctx.save_for_forward(u, inputs[1])

    @staticmethod
    def backward(ctx, g):
        u, K = ctx.saved_tensors
        a = _Blocked.apply(g.flip(0), K.flip(0)).flip(0)
        return a, a[:-1] * u[1:]

    @staticmethod
    def jvp(ctx, dv, dK):
        u, K = ctx.saved_tensors
        du = torch.zeros_like(u) if dv is None else dv
        if dK is not None:
            du = torch.cat([du[:-1] + u[1:] * dK, du[-1:]])
        return _Blocked.apply(du, K)

    @staticmethod
    def vmap(info, in_dims, v, K):
        n = info.batch_size
        v, K = (
            t.unsqueeze(-1).expand(*t.shape, n) if dim is None else t.movedim(dim, -1)
            for t, dim in zip((v, K), in_dims, strict=True)
        )
        return _Blocked.apply(v.flatten(1), K.flatten(1)).view_as(v), 2


def _pad(t: Tensor, length: int) -> Tensor:
    return torch.cat([t, t.new_zeros(length - len(t), *t.shape[1:])])


def _carries(v: Tensor | Sequence[Tensor], K: Carries) -> Tensor | list[Carry]:
    """K as diagonals (n-1, ...) if v is stacked and K is no list, else as n-1 carries."""
    n, stacked = len(v), isinstance(v, Tensor)
    K = 1.0 if K is None else K
    if isinstance(K, int | float) or (isinstance(K, Tensor) and K.ndim == 0):
        if not stacked:
            return [Scalar(K)] * (n - 1)
        K = torch.as_tensor(K, dtype=v.dtype, device=v.device)
        return K.expand(n - 1, *[1] * (v.ndim - 1))
    if len(K) != n - 1:
        raise ValueError(f"K has {len(K)} carries; expected {n - 1}, one less than v's {n}")
    if isinstance(K, Tensor) and stacked:
        K = K.reshape(n - 1, *[1] * (v.ndim - K.ndim), *K.shape[1:])
        if n > 1:  # one check: all diagonals have the same shape
            as_carry(K[0], v[1], "index 1")
        return K.to(v.dtype)
    return [as_carry(k, v[i + 1], f"index {i + 1}") for i, k in enumerate(K)]


def _diagonals(K: Carries) -> list[Tensor]:
    """The tensors in K whose dtype counts for type promotion; 0-d tensors do not count."""
    tensors = [K] if isinstance(K, Tensor) else K if isinstance(K, Sequence) else []
    tensors = [k.d if isinstance(k, Diagonal) else k for k in tensors]
    return [k for k in tensors if isinstance(k, Tensor) and k.ndim > 0]
