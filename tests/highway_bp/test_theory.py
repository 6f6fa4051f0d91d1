"""docs/method.md, sections 1 to 5, on small random chains of dense matrices in float64.

J, K (L + 1, N, N), of which the first is not used; b, w (L + 1, N); norms (L + 1,).
"""

import math

import pytest
import torch

from tests.highway_bp import oracle

L, N = 6, 4
every_seed = pytest.mark.parametrize("seed", range(2))


def random_chain(seed):
    generator = torch.Generator().manual_seed(seed)
    J, K = 0.4 * torch.randn(2, L + 1, N, N, generator=generator, dtype=torch.float64)
    return J, K, torch.randn(L + 1, N, generator=generator, dtype=torch.float64)


def scalar_chain(J, K, b):
    """The chain of numbers, or of L + 1 numbers each."""
    b = torch.as_tensor(b, dtype=torch.float64)[:, None]
    J, K = (torch.as_tensor(M, dtype=torch.float64).expand(len(b)) for M in (J, K))
    return J[:, None, None], K[:, None, None], b


def solved(A, b):
    """w_i = b_i + w_{i+1} A_{i+1} from the end; with K for A it is CumSumProd(b, K)."""
    w = b.clone()
    for i in reversed(range(len(b) - 1)):
        w[i] += w[i + 1] @ A[i + 1]
    return w


def through(w, M):
    """w_{i+1} M_{i+1} for every i, zero for i = L."""
    below = torch.zeros_like(w)
    below[:-1] = (w[1:, None] @ M[1:])[:, 0]
    return below


def iterate(J, K, b, k):
    """w^k by Theorem 2."""
    w = solved(K, b)
    for _ in range(k):
        w = solved(K, b + through(w, J))
    return w


def error_of(J, K, b, k):
    return solved(J + K, b) - iterate(J, K, b, k)


def spectral(M):
    return torch.linalg.matrix_norm(M, 2)


def bound_before(a, c, b, k, whole):
    """Section 2 from norms: e_0 .. e_L; ``whole`` are the l_m."""
    p, e = torch.zeros(k + 1, dtype=b.dtype), torch.zeros_like(b)
    p[0] = b[-1]
    for i in reversed(range(len(b) - 1)):
        e[i] = whole[i + 1] * e[i + 1] + a[i + 1] * p[k]
        p = c[i + 1] * p + torch.cat([b[i : i + 1], a[i + 1] * p[:-1]])
    return e


def bound_after(r, whole):
    """Section 4 from norms: the sums over j as a recursion."""
    return solved(whole[:, None, None], r[:, None])[:, 0]


def assert_at_most(values, bounds):
    assert (values <= bounds * (1 + 1e-9) + 1e-12).all()


@every_seed
def test_what_is_left_out_are_the_paths_through_more_than_k_blocks(seed):
    J, K, b = random_chain(seed)
    every_path = torch.stack(oracle.highway(J, K, b, L))
    for k in range(L + 2):
        short_paths = torch.stack(oracle.highway(J, K, b, k))
        torch.testing.assert_close(error_of(J, K, b, k), every_path - short_paths)
        assert error_of(J, K, b, k)[max(L - k, 0) :].norm() < 1e-12


@every_seed
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_no_error_is_above_the_bounds(seed, gamma):
    J, K, b = random_chain(seed)
    J, K, A = J + gamma * K, (1 - gamma) * K, J + K
    a, c, whole = map(spectral, (J, K, A))
    for k in range(L + 1):
        error, w = error_of(J, K, b, k).norm(dim=1), iterate(J, K, b, k)
        before = bound_before(a, c, b.norm(dim=1), k, whole)
        assert_at_most(error, before)
        assert_at_most(before, bound_before(a, c, b.norm(dim=1), k, a + c))
        assert not before[max(L - k, 0) :].any()
        r = b + through(w, A) - w
        assert_at_most(error, bound_after(r.norm(dim=1), whole))


@every_seed
def test_bounds_are_equalities_for_non_negative_scalars(seed):
    a, c, b_norms = torch.rand(3, L + 1, generator=torch.Generator().manual_seed(seed)).double()
    J, K, b = scalar_chain(a, c, b_norms)
    for k in range(L + 1):
        error, w = error_of(J, K, b, k)[:, 0], iterate(J, K, b, k)
        torch.testing.assert_close(bound_before(a, c, b_norms, k, a + c), error)
        r = b + through(w, J + K) - w
        torch.testing.assert_close(bound_after(r[:, 0], a + c), error)


@every_seed
def test_the_residual_is_the_last_increment_and_the_cotangent_of_the_error(seed):
    J, K, b = random_chain(seed)
    for k in range(1, L + 1):
        w = iterate(J, K, b, k)
        r = b + through(w, J + K) - w
        torch.testing.assert_close(r, through(w - iterate(J, K, b, k - 1), J))
        torch.testing.assert_close(solved(J + K, r), error_of(J, K, b, k))
    anything = torch.ones_like(b)
    r = b + through(anything, J + K) - anything
    torch.testing.assert_close(solved(J + K, r), solved(J + K, b) - anything)


def test_depth_leaves_the_tail_of_a_binomial():
    a, c = 0.3, 0.8
    for k in range(11):
        tail = 2 * sum(math.comb(9, m) * a**m * c ** (9 - m) for m in range(k + 1, 10))
        error = error_of(*scalar_chain(a, c, [0.0] * 9 + [2.0]), k)[0].item()
        assert error == pytest.approx(tail, rel=1e-9, abs=1e-12)


def test_carries_that_decay_make_error_and_increments_independent_of_the_length():
    a, c = 0.1, 0.6
    chains = [scalar_chain(a, c, [1.0] * (n + 1)) for n in (20, 200)]
    for k in range(4):
        limit = (a / (1 - c)) ** (k + 1) / (1 - c - a)
        short, long = (error_of(*chain, k)[0].item() for chain in chains)
        assert short < long == pytest.approx(limit, rel=1e-9)
    d = [(iterate(*chains[1], k) - iterate(*chains[1], k - 1)).norm().item() for k in (1, 2)]
    q = d[1] / d[0]  # section 5
    assert d[1] * q / (1 - q) == pytest.approx(error_of(*chains[1], 2).norm().item(), rel=0.02)


@every_seed
def test_groups_of_two_leave_out_a_part_of_the_paths(seed):
    numbers = torch.rand(2, L + 1, generator=torch.Generator().manual_seed(seed))
    one_loss = torch.eye(L + 1)[-1]
    for J, K, b in (random_chain(seed), scalar_chain(*numbers, one_loss)):
        A = J + K
        A_groups, K_groups = (torch.cat([M[:1], M[2::2] @ M[1::2]]) for M in (A, K))
        groups = A_groups - K_groups, K_groups, (b + through(b, A))[::2]
        torch.testing.assert_close(solved(A_groups, groups[2]), solved(A, b)[::2])
    for k in range(L // 2):  # of the scalar chain, nothing in which cancels
        assert_at_most(error_of(*groups, k), error_of(J, K, b, k)[::2])


@every_seed
def test_the_fixed_point_leaves_out_losses_more_than_k_layers_away(seed):
    J, K, b = random_chain(seed)
    A, nothing, one_loss = J + K, 0 * K, b.clone()
    one_loss[:-1] = 0
    a, sizes = spectral(A), b.norm(dim=1)
    for k in range(L + 1):
        error = error_of(A, nothing, b, k).norm(dim=1)
        for i in range(L + 1):
            far = [sizes[j] * a[i + 1 : j + 1].prod() for j in range(i + k + 1, L + 1)]
            assert_at_most(error[i], sum(far, torch.zeros(())))
        assert not iterate(A, nothing, one_loss, k)[: L - k].any()
