"""CumSumProd across ranks: u_i = v_i + u_{i+1} M_i, one index per rank (paper, Appendix E).

Rank r holds v_r and gets u_r; M_r carries the cotangent of rank r+1 to rank r. Ranks 0 .. n take
part, the others keep their v. `sequential`, `doubling` and `gathered` give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from highway_bp.carry import Carry, Diagonal, Identity, Scalar
from highway_bp.parallel.ranks import Ranks

Factor = Tensor | None  # an elementwise M; None is the identity


def sequential(
    ranks: Ranks, v: Tensor, carried: Callable[[Tensor], Tensor], below: Tensor | None, n: int
) -> Tensor:
    """The reference: one message after another, from rank n to rank 0; any carry.

    ``carried(u)`` is u M_{r-1}, formed on rank r, a tensor like ``below``, the state of rank r-1.
    """
    r, u = ranks.rank, v
    if r < n:
        received = torch.empty_like(v)
        ranks.exchange([], [(received, r + 1)])
        u = v + received
    if 0 < r <= n:
        ranks.exchange([(carried(u).to(below.dtype), r - 1)], [])
    return u


def doubling(ranks: Ranks, v: Tensor, products: Sequence[Factor], n: int) -> Tensor:
    """The paper's Algorithm 1: log2 n rounds in which all ranks speak at once.

    ``products[j]`` carries the cotangent of rank r + 2^j to rank r (`doubled`).
    """
    r, u = ranks.rank, v
    for j, P in enumerate(products):
        m = 1 << j
        if m > n:
            break
        takes, received = r + m <= n, torch.empty_like(u)
        ranks.exchange([(u, r - m)] if m <= r <= n else [], [(received, r + m)] if takes else [])
        if takes:
            u = u + _times(received, P)
    return u


def doubled(ranks: Ranks, M: Factor) -> list[Factor]:
    """M_r, M_{r+1} M_r, ... over 1, 2, 4, ... ranks; once per backward pass.

    Where a product would leave the group it is of no use, and some number.
    """
    products, m = [], 1
    while m < ranks.size:
        products.append(M)
        if M is not None:
            received = torch.ones_like(M)
            ranks.exchange(
                [(M, ranks.rank - m)] if ranks.rank >= m else [],
                [(received, ranks.rank + m)] if ranks.rank + m < ranks.size else [],
            )
            M = M * received
        m *= 2
    return products


def gathered(ranks: Ranks, v: Tensor, factors: Sequence[Factor], n: int) -> Tensor:
    """One collective: every rank gets every v, and sums up what is behind it."""
    everyone = _from_all(ranks, v)
    if ranks.rank >= n:
        return v
    u = everyone[n]
    for i in reversed(range(ranks.rank, n)):
        u = everyone[i] + _times(u, factors[i])
    return u


def all_factors(ranks: Ranks, M: Factor) -> list[Factor]:
    """M_0 .. M_{P-1} on every rank; once per backward pass."""
    if M is None:
        return [None] * ranks.size
    return _from_all(ranks, M)


def kind_of(M: Carry) -> int:
    """0 for the identity, 1 for a number, 2 for a diagonal, 3 for what cannot be sent."""
    kinds = (Identity, Scalar, Diagonal)
    return kinds.index(type(M)) if type(M) in kinds else len(kinds)


def as_factor(M: Carry, kind: int, like: Tensor) -> Factor:
    """M as ranks exchange it, when the largest `kind_of` among them is ``kind``."""
    if kind == 0:
        return None
    return M.vecmat(torch.ones_like(like) if kind == 2 else like.new_ones(1))


def _from_all(ranks: Ranks, v: Tensor) -> list[Tensor]:
    v = v.contiguous()
    everyone = [torch.empty_like(v) for _ in range(ranks.size)]
    dist.all_gather(everyone, v, group=ranks.group)
    return everyone


def _times(u: Tensor, M: Factor) -> Tensor:
    return u if M is None else u * M
