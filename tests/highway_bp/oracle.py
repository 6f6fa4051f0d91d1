"""The gradients of the paper, summed path by path from dense Jacobians.

Nothing here comes from `highway_bp`. States are flattened to row vectors, so that with n_i the
number of elements of state i

    J[i], K[i]   (n_i, n_{i-1})   for i = 1..L; index 0 holds None
    b[i]         (n_i,)           for i = 0..L

and a path from state j down to state i is b_j M_j M_{j-1} ... M_{i+1}, each M one of J, K.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

Matrices = Sequence[Tensor | None]
Vectors = Sequence[Tensor]


def subsets(items: Sequence[int], at_most: int) -> Iterator[tuple[int, ...]]:
    """All subsets of `items` with at most `at_most` elements."""
    for size in range(min(at_most, len(items)) + 1):
        yield from combinations(items, size)


def path(b_j: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """b_j M_j ... M_{i+1}, `factors` in that order."""
    for M in factors:
        b_j = b_j @ M
    return b_j


def highway(J: Matrices, K: Matrices, b: Vectors, k: int) -> list[Tensor]:
    """w_i^k for i = 0..L: every path that goes through at most k blocks (Theorem 2)."""
    L = len(b) - 1
    w = []
    for i in range(L + 1):
        w_i = torch.zeros_like(b[i])
        for j in range(i, L + 1):
            for blocks in subsets(range(i + 1, j + 1), k):
                downwards = [J[m] if m in blocks else K[m] for m in range(j, i, -1)]
                w_i = w_i + path(b[j], downwards)
        w.append(w_i)
    return w


def fixed_point(A: Matrices, b: Vectors, k: int) -> list[Tensor]:
    """w_i after k iterations: every path of exactly m whole layers A = J + K, m <= k."""
    L = len(b) - 1
    w = []
    for i in range(L + 1):
        w_i = torch.zeros_like(b[i])
        for m in range(k + 1):
            if i + m <= L:
                w_i = w_i + path(b[i + m], [A[n] for n in range(i + m, i, -1)])
        w.append(w_i)
    return w


def with_gamma(J: Matrices, K: Matrices, gamma: float) -> tuple[Matrices, Matrices]:
    """Part gamma of the carry moved into the block: J + gamma K and (1 - gamma) K."""
    return (
        [None, *(J_i + gamma * K_i for J_i, K_i in zip(J[1:], K[1:], strict=True))],
        [None, *((1 - gamma) * K_i for K_i in K[1:])],
    )


def product(M: Matrices, start: int, end: int) -> Tensor:
    """M_end ... M_{start+1}, the Jacobian of layers start+1..end."""
    result = torch.eye(M[end].shape[0], dtype=M[end].dtype)
    for m in range(end, start, -1):
        result = result @ M[m]
    return result


def group_bounds(L: int, size: int) -> list[tuple[int, int]]:
    """(input state, output state) of each group of `size` layers; the last may be shorter."""
    return [(start, min(start + size, L)) for start in range(0, L, size)]


def grouped(J: Matrices, K: Matrices, b: Vectors, size: int) -> tuple[Matrices, Matrices, Vectors]:
    """J, K, b of the chain whose layers are groups of `size` layers.

    A group's Jacobian is the product of its layers', its carry the product of their carries; the
    losses on states inside it belong to b at its input.
    """
    A = [None, *(J_i + K_i for J_i, K_i in zip(J[1:], K[1:], strict=True))]
    bounds = group_bounds(len(b) - 1, size)
    K_groups = [None, *(product(K, start, end) for start, end in bounds)]
    J_groups = [
        None,
        *(product(A, s, e) - K_g for (s, e), K_g in zip(bounds, K_groups[1:], strict=True)),
    ]
    b_groups = [
        b[start] + sum(b[i] @ product(A, start, i) for i in range(start + 1, end))
        for start, end in bounds
    ]
    return J_groups, K_groups, [*b_groups, b[-1]]


def inside_groups(w_groups: Vectors, A: Matrices, b: Vectors, size: int) -> list[Tensor]:
    """w at every state, from w at the groups' ends: exact substitution inside each group."""
    w: list[Tensor | None] = [None] * len(b)
    bounds = group_bounds(len(b) - 1, size)
    for (start, end), w_in, w_out in zip(bounds, w_groups, w_groups[1:], strict=False):
        w[start], w[end] = w_in, w_out
        for i in range(end - 1, start, -1):
            w[i] = b[i] + w[i + 1] @ A[i + 1]
    return w


def solution(
    J: Matrices, K: Matrices, b: Vectors, k: int, gamma=0.0, size=1, fixed=False
) -> list[Tensor]:
    """w at every state by Highway(k, gamma, size), or by FixedPoint(k, size).

    A group counts as one layer: gamma moves part of the group's carry into its block.
    """
    A = [None, *(J_i + K_i for J_i, K_i in zip(J[1:], K[1:], strict=True))]
    J, K, b_groups = grouped(J, K, b, size)
    if fixed:
        w = fixed_point(with_gamma(J, K, 1.0)[0], b_groups, k)
    else:
        w = highway(*with_gamma(J, K, gamma), b_groups, k)
    return inside_groups(w, A, b, size)


class DenseChain:
    """A chain's exact states and its dense Jacobians, in float64.

    Each layer must offer `r(h, z)` and `g(h, *args, **kwargs)` with f(h) = r(h, g(h)); K is the
    derivative of r in h with z held, J the rest of the derivative of f.
    """

    def __init__(
        self, layers: Sequence[nn.Module], x: Tensor, args: tuple = (), kwargs: dict | None = None
    ) -> None:
        self.layers, self.args, self.kwargs = list(layers), args, kwargs or {}
        self.states = [x.detach()]
        self.A: list[Tensor | None] = [None]
        self.K: list[Tensor | None] = [None]
        for layer in self.layers:
            h = self.states[-1]
            with torch.no_grad():
                z = layer.g(h, *self.args, **self.kwargs)
                self.states.append(layer(h, *self.args, **self.kwargs))
            self.A.append(self._matrix(self._whole(layer), h))
            self.K.append(self._matrix(lambda h, layer=layer, z=z: layer.r(h, z), h))
        self.J = [None, *(A_i - K_i for A_i, K_i in zip(self.A[1:], self.K[1:], strict=True))]

    def _whole(self, layer: nn.Module):
        return lambda h: layer(h, *self.args, **self.kwargs)

    @staticmethod
    def _matrix(f, h: Tensor) -> Tensor:
        dense = jacobian(f, h)  # (*output, *input)
        return dense.reshape(-1, h.numel()).detach()

    def cotangents(self, loss) -> list[Tensor]:
        """b_0..b_L of `loss(states 1..L)`."""
        leaves = [h.clone().requires_grad_() for h in self.states]
        found = torch.autograd.grad(loss(leaves[1:]), leaves, allow_unused=True)
        zipped = zip(found, leaves, strict=True)
        return [(torch.zeros_like(h) if g is None else g).reshape(-1) for g, h in zipped]

    def leaf_gradients(self, w: Vectors, leaves: Sequence[Tensor]) -> list[Tensor]:
        """sum_i w_i . d f_i / d leaf with h_{i-1} held, for each leaf."""
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for layer, h, w_i in zip(self.layers, self.states[:-1], w[1:], strict=True):
            out = self._whole(layer)(h)
            if not out.requires_grad or not leaves:
                continue
            found = torch.autograd.grad(out, leaves, w_i.reshape(out.shape), allow_unused=True)
            for t, g in zip(total, found, strict=True):
                if g is not None:
                    t += g
        return total
