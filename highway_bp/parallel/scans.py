"""CumSumProd across ranks: u_i = v_i + u_{i+1} M_i, one index per rank (paper, Appendix E).

Rank r holds v_r and gets u_r; M_r carries the cotangent of rank r+1 to rank r. Ranks 0 .. n take
part, the others keep their v. `sequential`, `doubling` and `gathered` give the same result.
A factor is an elementwise M, or None for the identity.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from highway_bp.parallel.ranks import Ranks


def sequential(ranks: Ranks, v: Tensor, carried: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The reference: one message after another, from rank n to rank 0; for any carry.

    ``carried(u)`` is u M_{r-1}, computed on rank r.
    """
    r, u = ranks.rank, v
    if r < n:
        u = v + ranks.receive(v, r + 1).wait()
    if 0 < r <= n:
        ranks.send(carried(u), r - 1).wait()
    return u


def doubling(ranks: Ranks, v: Tensor, products: Sequence[Tensor | None], n: int) -> Tensor:
    """The paper's Algorithm 1: log2 n rounds, in each of which all ranks send at once.

    ``products[j]`` carries the cotangent of rank r + 2^j to rank r (`doubled`).
    """
    u = v
    for j, P in enumerate(products):
        received = ranks.shift(u, u, range(1 << j, n + 1), by=1 << j)
        if received is not None:
            u = u + _times(received, P)
    return u


def doubled(ranks: Ranks, M: Tensor | None) -> list[Tensor | None]:
    """M_r, M_{r+1} M_r, ... over 1, 2, 4, ... ranks; computed once per backward pass. A product
    that would go beyond the last rank is arbitrary and not used."""
    products, m = [], 1
    while m < ranks.size:
        products.append(M)
        received = None if M is None else ranks.shift(M, M, range(ranks.size), by=m)
        M, m = M if received is None else M * received, 2 * m
    return products


def gathered(ranks: Ranks, v: Tensor, factors: Sequence[Tensor | None], n: int) -> Tensor:
    """One collective: every rank gets every v and computes its own u, with `all_factors`."""
    everyone = ranks.all_gather(v)
    if ranks.rank >= n:
        return v
    u = everyone[n]
    for i in reversed(range(ranks.rank, n)):
        u = everyone[i] + _times(u, factors[i])
    return u


def all_factors(ranks: Ranks, M: Tensor | None) -> list[Tensor | None]:
    """M_0 .. M_{P-1} on every rank; gathered once per backward pass."""
    return [None] * ranks.size if M is None else ranks.all_gather(M)


def _times(u: Tensor, M: Tensor | None) -> Tensor:
    return u if M is None else u * M
