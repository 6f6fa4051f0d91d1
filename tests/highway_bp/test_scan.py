"""cumsumprod against the literal double sum of its definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import highway_bp as hb
from highway_bp import reference
from tests.highway_bp import oracle

ALGORITHMS = ["auto", "sequential", "hillis_steele", "blocked"]
SHAPES = [(1,), (3,), (2, 3), (2, 3, 2)]

every_list_algorithm = pytest.mark.parametrize("algorithm", ["auto", "sequential", "hillis_steele"])
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
lengths = st.integers(1, 17)
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 1000)


def definition(v: list[Tensor], K: list[Tensor]) -> list[Tensor]:
    """sum_{j >= i} v_j K_{j-1} ... K_i with dense K[i] (elements of i+1, elements of i)."""
    result = []
    for i in range(len(v)):
        total = torch.zeros(v[i].numel(), dtype=v[i].dtype)
        for j in range(i, len(v)):
            term = v[j].reshape(-1)
            for m in range(j - 1, i - 1, -1):
                term = term @ K[m]
            total = total + term
        result.append(total.reshape(v[i].shape))
    return result


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(found, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert (f - e).norm() <= 1e-12 * max(1.0, e.norm().item())


@every_algorithm
@settings(max_examples=50, deadline=None)
@given(n=lengths, shape=shapes, seed=seeds, kind=st.sampled_from([None, 0.6, -1.1, "all", "one"]))
def test_numbers_and_diagonals(algorithm, n, shape, seed, kind):
    """Diagonals of "all" entries, or of "one" that is broadcast."""
    torch.manual_seed(seed)
    v, K, carries = double(n, *shape), kind, kind
    if isinstance(kind, str):
        K = double(n - 1, *(shape if kind == "all" else [1] * len(shape)))
        carries = [hb.Diagonal(d) for d in K]
    numbers = K if isinstance(K, Tensor) else torch.full((n - 1,), K or 1.0, dtype=v.dtype)
    dense = [torch.diag(d.expand(shape).reshape(-1)) for d in numbers]
    expected = definition(list(v), dense)
    found = hb.cumsumprod(v, K, algorithm)
    assert isinstance(found, Tensor) and found.shape == v.shape
    assert_same(found, expected)
    if algorithm != "blocked":
        as_list = hb.cumsumprod(list(v), carries, algorithm)
        assert isinstance(as_list, list)
        assert_same(as_list, expected)


def random_carry(kind: str, width: int) -> tuple[object, Tensor]:
    """A carry of the library on states (2, width), and its dense matrix (2 width, 2 width)."""
    eye = torch.eye(2 * width, dtype=torch.float64)
    if kind == "identity":
        return hb.Identity(), eye
    if kind == "scalar":
        return hb.Scalar(0.7), 0.7 * eye
    if kind == "diagonal":
        d = double(2, width)
        return hb.Diagonal(d), torch.diag(d.reshape(-1))
    if kind == "permutation":
        index = torch.randperm(width)
        rows = torch.eye(width, dtype=torch.float64)[index]  # h -> h[index]
        return hb.Permutation(index), torch.block_diag(rows, rows)
    M = double(width, width)
    return hb.LinearMap(lambda h: h @ M.T, double(2, width)), torch.block_diag(M, M)


KINDS = ["identity", "scalar", "diagonal", "permutation", "linear"]


@every_list_algorithm
@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), max_size=9), width=st.integers(1, 4), seed=seeds)
def test_lists_of_carries(algorithm, kinds, width, seed):
    torch.manual_seed(seed)
    v = [double(2, width) for _ in range(len(kinds) + 1)]
    pairs = [random_carry(kind, width) for kind in kinds]
    carries, dense = [c for c, _ in pairs], [M for _, M in pairs]
    expected = definition(v, dense)
    assert_same(hb.cumsumprod(v, carries, algorithm), expected)
    stacked = hb.cumsumprod(torch.stack(v), carries, algorithm)
    assert isinstance(stacked, Tensor)
    assert_same(stacked, expected)


@every_list_algorithm
def test_states_of_different_width(algorithm):
    widths = [2, 5, 3, 3, 4, 1]
    M = [double(out, in_) for in_, out in pairwise(widths)]
    v = [double(1, n) for n in widths]
    like = [double(1, n) for n in widths[:-1]]
    carries = [hb.LinearMap(lambda h, m=m: h @ m.T, x) for m, x in zip(M, like, strict=True)]
    assert_same(hb.cumsumprod(v, carries, algorithm), definition(v, M))


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_composition_is_the_jacobian_product(first, second):
    a, A = random_carry(first, 3)
    b, B = random_carry(second, 3)
    w = double(2, 3)
    expected = (w.reshape(-1) @ A @ B).reshape(2, 3)
    torch.testing.assert_close((a @ b).vecmat(w), expected)
    torch.testing.assert_close((a @ b).vecmat(w), b.vecmat(a.vecmat(w)))


def test_permutation_follows_index_select_along_its_dimension():
    index = torch.tensor([2, 0, 1])
    h = double(2, 2, 3).requires_grad_()
    w = double(2, 2, 3)
    (expected,) = torch.autograd.grad(h.index_select(2, index), h, w)
    torch.testing.assert_close(hb.Permutation(index, dim=2).vecmat(w), expected)


@every_algorithm
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_differentiable_in_v_and_diagonals_and_with_the_identity(algorithm, n):
    v = double(n, 3).requires_grad_()
    K = double(n - 1, 3).requires_grad_()
    for carry in (K, None):
        assert torch.autograd.gradcheck(lambda v, K: hb.cumsumprod(v, K, algorithm), (v, carry))


@every_algorithm
def test_input_is_left_as_it_was(algorithm):
    v, K = double(9, 3), double(8, 3)
    v_before, K_before = v.clone(), K.clone()
    hb.cumsumprod(v, K, algorithm)
    assert torch.equal(v, v_before) and torch.equal(K, K_before)


@every_algorithm
@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("of_v", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_K", [torch.float32, torch.float64, torch.bool, 0.5])
def test_the_dtype_is_that_of_both_whatever_the_length(algorithm, n, of_v, of_K):
    v = torch.ones(n, 3, dtype=of_v)
    K = torch.ones(n - 1, 3).to(of_K) if isinstance(of_K, torch.dtype) else of_K
    wanted = torch.promote_types(of_v, of_K) if isinstance(K, Tensor) else of_v
    assert hb.cumsumprod(v, K, algorithm).dtype == wanted
    if algorithm != "blocked":
        assert {u.dtype for u in hb.cumsumprod(list(v), K, algorithm)} == {wanted}


@every_algorithm
@pytest.mark.parametrize("n", [1, 3, 40])
def test_whole_numbers_are_refused(algorithm, n):
    v = torch.ones(n, 2, dtype=torch.int64)
    for K in (None, 2, torch.ones(n - 1, 2)):
        with pytest.raises(TypeError, match=r"v has dtype torch.int64; expected a floating dtype"):
            hb.cumsumprod(v, K, algorithm)


@every_list_algorithm
@pytest.mark.parametrize("stacked", [True, False])
def test_a_list_of_tensors_gets_gradients(algorithm, stacked):
    v, K = double(4, 3), [double(3), torch.tensor(0.5).double(), double(1)]
    tensors = [v, *(k.requires_grad_() for k in K)]

    def call(v, *K):
        found = hb.cumsumprod(v if stacked else list(v), list(K), algorithm)
        return found if stacked else torch.stack(found)

    assert torch.autograd.gradcheck(call, tensors)


@every_algorithm
@pytest.mark.parametrize("n", [1, 4, 40])
def test_a_0d_tensor_is_a_number(algorithm, n):
    v, K = double(n, 2), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        hb.cumsumprod(v, K, algorithm).detach(), hb.cumsumprod(v, 0.7, algorithm)
    )
    assert torch.autograd.gradcheck(lambda K: hb.cumsumprod(v, K, algorithm), K)


@pytest.mark.parametrize("algorithm", ["auto", "sequential", "blocked"])
@pytest.mark.parametrize("n", [10, 40])
def test_products_that_overflow(algorithm, n):
    v = torch.zeros(n, 2)
    v[0], v[1, 0] = 1.0, 1e-30
    found = hb.cumsumprod(v, torch.full((n - 1, 2), 1e30), algorithm)
    torch.testing.assert_close(found[0], torch.tensor([2.0, 1.0]))
    assert not found[2:].any()


def test_blocked_under_transforms_and_twice():
    v, K = double(20, 3), double(19, 3).tanh()

    def loss(v, K, algorithm):
        return hb.cumsumprod(v, K, algorithm).square().sum()

    found, wanted = (
        torch.func.vmap(torch.func.hessian(loss, 1), (None, 0, None))(
            v, torch.stack([K, K.flip(0)]), algorithm
        )
        for algorithm in ("blocked", "hillis_steele")
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("k", range(5))
def test_the_papers_formula_is_the_sum_over_paths(k):
    """`reference.highway` against the brute-force oracle, and at k = L against substitution."""
    J, K = [double(3, 3) for _ in range(4)], [double(3, 3) for _ in range(4)]
    b = [double(3) for _ in range(5)]
    w = reference.highway(J, K, b, k)
    assert_same(w, oracle.highway([None, *J], [None, *K], b, k))
    exact = definition(b, [J_i + K_i for J_i, K_i in zip(J, K, strict=True)])
    assert all(torch.allclose(*pair) for pair in zip(w, exact, strict=True)) == (k == 4)


@every_algorithm
def test_wrong_number_of_carries(algorithm):
    for K, n in ((double(3, 2), 3), ([hb.Identity()], 1)):
        with pytest.raises(ValueError, match=f"K has {n} carries; expected 2, one less than v's 3"):
            hb.cumsumprod(double(3, 2), K, algorithm)


def test_algorithms_that_cannot_be_had():
    with pytest.raises(ValueError, match="algorithm='blocked' needs a stacked v and scalar or"):
        hb.cumsumprod(double(3, 2), [hb.Identity(), hb.Identity()], "blocked")
    with pytest.raises(ValueError, match="algorithm='fastest'; expected one of auto, sequential"):
        hb.cumsumprod(double(3, 2), None, "fastest")
