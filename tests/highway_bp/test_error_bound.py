"""Bounds of the error against the explicit sum over paths, and on the zoo of architectures."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import highway_bp as hb
from highway_bp.diagnostics import bounds
from highway_bp.diagnostics import spectral as spectral_module
from highway_bp.diagnostics.error_bound import error_bound
from highway_bp.diagnostics.layer_norms import layer_norms
from tests.highway_bp import oracle
from tests.highway_bp.architectures import ARCHITECTURES, build
from tests.highway_bp.test_paths import every_architecture, loss_of, reference

ROUNDING = 1 + 1e-9
norms = st.floats(0, 3)


def longer_paths(a, c, b, k):
    """Of every state, the sum over all subsets of more than k blocks, term by term."""
    L = len(a)
    sums = []
    for i in range(L + 1):
        total = 0.0
        for j in range(i, L + 1):
            between = range(i, j)  # layers i+1 .. j, counted from 0
            for size in range(k + 1, j - i + 1):
                for blocks in combinations(between, size):
                    total += b[j] * math.prod(a[m] if m in blocks else c[m] for m in between)
        sums.append(total)
    return sums


@given(st.data(), st.integers(1, 6), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_the_bound_is_the_sum_over_subsets_of_more_than_k_blocks(data, L, k):
    a, c = (data.draw(st.lists(norms, min_size=L, max_size=L)) for _ in range(2))
    b = data.draw(st.lists(norms, min_size=L + 1, max_size=L + 1))
    found = bounds.remainder_bound(a, c, b, k)
    assert found == pytest.approx(longer_paths(a, c, b, k), rel=1e-12, abs=1e-300)
    assert all(found[i] == 0.0 for i in range(max(L - k, 0), L + 1))


def test_identical_layers_and_one_loss_leave_the_tail_of_a_binomial():
    L, a, c = 9, 0.3, 0.8
    for k in range(L + 2):
        tail = sum(math.comb(L, m) * a**m * c ** (L - m) for m in range(k + 1, L + 1))
        found = bounds.remainder_bound([a] * L, [c] * L, [0.0] * L + [2.0], k)
        assert found[0] == pytest.approx(2 * tail, rel=1e-12)


def test_carries_that_decay_make_the_bound_independent_of_the_length():
    a, c = 0.1, 0.6
    for k in range(5):
        limit = (a / (1 - c)) ** (k + 1) / (1 - c - a)
        found = [bounds.remainder_bound([a] * L, [c] * L, [1.0] * (L + 1), k)[0] for L in (20, 200)]
        assert found[0] < found[1] <= limit * ROUNDING
        assert found[1] == pytest.approx(limit, rel=1e-9)


@given(st.lists(st.tuples(norms, norms), min_size=6, max_size=6), st.sampled_from([2, 3]))
@settings(max_examples=40, deadline=None)
def test_groups_leave_fewer_paths_out(layers, size):
    a, c = zip(*layers, strict=True)
    runs = [layers[i : i + size] for i in range(0, 6, size)]
    c_runs = [math.prod(y for _, y in run) for run in runs]
    whole = [math.prod(x + y for x, y in run) for run in runs]
    a_runs = [w - y for w, y in zip(whole, c_runs, strict=True)]
    for k in range(len(runs) + 1):
        grouped = bounds.remainder_bound(a_runs, c_runs, [0.0] * len(runs) + [1.0], k)
        assert grouped[0] <= bounds.remainder_bound(a, c, [0.0] * 6 + [1.0], k)[0] * ROUNDING + 1e-9


@given(st.data(), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_bounds_are_equalities_for_a_positive_scalar_chain(data, L, k):
    J, K = (data.draw(st.lists(norms, min_size=L, max_size=L)) for _ in range(2))
    b = data.draw(st.lists(norms, min_size=L + 1, max_size=L + 1))
    dense = [[None, *(torch.full((1, 1), x, dtype=torch.float64) for x in M)] for M in (J, K)]
    vectors = [torch.full((1,), x, dtype=torch.float64) for x in b]
    exact, w = (oracle.highway(*dense, vectors, n) for n in (L, k))
    error = [(e - v).item() for e, v in zip(exact, w, strict=True)]
    assert bounds.remainder_bound(J, K, b, k) == pytest.approx(error, rel=1e-9, abs=1e-9)
    layers = [x + y for x, y in zip(J, K, strict=True)]
    r = [(vectors[i] + w[i + 1] * layers[i] - w[i]).item() for i in range(L)] + [0.0]
    assert bounds.residual_bound(layers, r) == pytest.approx(error, rel=1e-9, abs=1e-9)


def test_the_residual_is_the_last_increment_through_the_blocks():
    ref = reference("every-carry")
    b, w = ref.b["all"], [oracle.highway(ref.J, ref.K, ref.b["all"], k) for k in range(3)]
    for i in range(ref.L):
        r = b[i] + w[2][i + 1] @ ref.A[i + 1] - w[2][i]
        torch.testing.assert_close(r, (w[2][i + 1] - w[1][i + 1]) @ ref.J[i + 1])


def spectral(matrices):
    return [torch.linalg.matrix_norm(M, 2).item() for M in matrices[1:]]


def assert_bounded(J, K, b, what):
    """The bounds from exact norms, for every k and at every state."""
    L = len(b) - 1
    A = [None, *(J_m + K_m for J_m, K_m in zip(J[1:], K[1:], strict=True))]
    sizes = [v.norm().item() for v in b]
    J_norms, K_norms, A_norms = map(spectral, (J, K, A))
    iterates = [oracle.highway(J, K, b, k) for k in range(L + 1)]
    scale = max(w.norm().item() for w in iterates[L])
    for k, w in enumerate(iterates):
        error = [(e - v).norm().item() for e, v in zip(iterates[L], w, strict=True)]
        r = [(b[i] + w[i + 1] @ A[i + 1] - w[i]).norm().item() for i in range(L)] + [0.0]
        paths = bounds.remainder_bound(J_norms, K_norms, sizes, k)
        sharper = bounds.remainder_bound(J_norms, K_norms, sizes, k, A_norms)
        residual = bounds.residual_bound(A_norms, r)
        for i in range(L + 1):
            for bound in (paths[i], sharper[i], residual[i]):
                assert error[i] <= bound * ROUNDING + 1e-12 * scale, f"{what}, k = {k}, state {i}"
            assert sharper[i] <= paths[i] * ROUNDING
        if k == L:
            assert not any(paths) and not any(sharper)


@every_architecture
def test_no_error_is_above_the_bounds_with_exact_norms(name):
    ref = reference(name)
    for losses, gamma in (("final", 0.0), ("all", 0.0), ("all", 0.3)):
        J, K = oracle.with_gamma(ref.J, ref.K, gamma)
        assert_bounded(J, K, ref.b[losses], f"{losses}, gamma = {gamma}")
    for gamma, size in ((0.0, 2), (1.0, 2), (0.3, 3)):
        J, K, b = oracle.grouped(ref.J, ref.K, ref.b["all"], size)
        J, K = oracle.with_gamma(J, K, gamma)
        assert_bounded(J, K, b, f"gamma = {gamma}, groups of {size}")


class Zoo(nn.Module):
    """An architecture as a model, with the loss on all states of `test_paths`."""

    def __init__(self, name):
        super().__init__()
        a = self.architecture = build(name)
        self.chain = hb.ResidualChain(a.layers)
        self.x = a.x.detach().requires_grad_(a.x_requires_grad)

    def loss(self):
        a = self.architecture
        return loss_of("all", self.chain(self.x, *a.args, return_states=True, **a.kwargs))


METHODS = [hb.Highway(0), hb.Highway(0, gamma="auto", group_size=2), hb.FixedPoint(0)]


TRAINABLE = [name for name in ARCHITECTURES if list(build(name).leaves)]


@pytest.mark.parametrize("name", TRAINABLE)
def test_norms_and_errors_measured_on_a_chain_are_those_of_its_dense_jacobians(name):
    ref, model = reference(name), Zoo(name)
    everywhere = ref.architecture.x_requires_grad
    for method in METHODS if ref.L < 5 else METHODS[:1]:
        found = error_bound(model, Zoo.loss, range(ref.L + 2), method)
        for e in found:
            assert e.measured <= e.bound * ROUNDING + 1e-12, (method, e)
            assert e.measured <= e.residual_bound * ROUNDING + 1e-12, (method, e)
        assert found[-1].bound == 0.0 and found[-1].residual_bound < 1e-12
        if method == hb.Highway(0) and everywhere:
            w = [torch.cat(oracle.highway(ref.J, ref.K, ref.b["all"], k)) for k in range(ref.L + 1)]
            errors = [((v - w[-1]).norm() / w[-1].norm()).item() for v in w]
            assert [e.measured for e in found[:-1]] == pytest.approx(errors, rel=1e-8, abs=1e-12)
    if everywhere:
        assert_exact_norms(ref, model)


def assert_exact_norms(ref, model):
    """Norms of J, K, J + K: not below the dense ones, and above by Lanczos' margin at most."""
    seen = []

    class Look(hb.Highway):
        def solve(self, system):
            seen.append(layer_norms(system, [0.0] * system.length))
            return super().solve(system)

    model.chain.method = Look(0)
    model.loss().backward()
    (norms,) = seen
    for found, dense in ((norms.blocks, ref.J), (norms.carries, ref.K), (norms.layers, ref.A)):
        for n, exact in zip(found, spectral(dense), strict=True):
            assert exact * (1 - 1e-9) - 1e-12 <= n <= 1.1 * exact + 1e-9


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n", [3, 40, 400])
def test_the_spectral_norm_comes_from_above_with_a_small_margin(n):
    M = torch.randn(n, n + 2, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(M, 2).item()
    found = spectral_module.spectral_norm(lambda w: w @ M, M[:, 0], generator())
    assert exact * (1 - 1e-12) <= found <= 1.12 * exact


def test_gains_of_probes_are_frobenius_norms(monkeypatch):
    M = torch.randn(6, 4, dtype=torch.float64)
    monkeypatch.setattr(spectral_module, "PROBES", 4000)
    found = spectral_module.gain(lambda w: w @ M, M[:, 0], generator())
    assert found == pytest.approx(M.norm().item() / math.sqrt(6), rel=0.03)


class Random(nn.Module):
    """h + s h R, R an orthogonal matrix drawn at random."""

    def __init__(self, d, s):
        super().__init__()
        Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
        self.R = nn.Parameter(s * Q)

    def forward(self, h):
        return h + h @ self.R


def random_chain(L, d, s):
    model = nn.Module()
    model.chain = hb.ResidualChain(Random(d, s) for _ in range(L))
    x = torch.randn(1, d, dtype=torch.float64)
    return model, lambda model: (model.chain(x) * torch.linspace(-1, 1, d)).sum()


def test_probes_are_right_where_paths_are_orthogonal_and_directions_alike():
    found = error_bound(*random_chain(L=4, d=500, s=0.5), range(4))
    for e in found:
        assert e.probe_estimate == pytest.approx(e.measured, rel=0.15)
        if e.k < 2:  # from there on, one path is left, or none
            assert e.bound > 1.5 * e.measured


def test_a_geometric_series_of_increments_is_summed():
    assert bounds.increment_estimate([8.0, 4.0, 2.0]) == pytest.approx(2.0)  # 1 + 1/2 + ...
    assert math.isnan(bounds.increment_estimate([8.0]))
    assert bounds.increment_estimate([1.0, 2.0]) == math.inf
    assert bounds.increment_estimate([1.0, 0.0]) == 0.0


class Scaling(nn.Module):
    """f(h) = h + s h: every direction has the same gain."""

    def __init__(self, s):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, h):
        return h + self.s * h


def test_all_but_the_probes_are_exact_for_a_positive_scalar_chain_with_one_loss():
    model = nn.Module()
    model.chain = hb.ResidualChain(Scaling(s) for s in (0.5, 0.2, 0.9))
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    at_first = {k: v.clone() for k, v in model.state_dict().items()}
    for e in error_bound(model, lambda model: model.chain(x).sum(), range(3)):
        for estimate in (e.bound, e.residual_bound, e.residual_estimate):
            # norms over all states of per-state equalities
            assert estimate == pytest.approx(e.measured, rel=1e-9)
    assert model.chain.method == hb.Backprop() and x.grad is None
    assert all(torch.equal(v, at_first[k]) for k, v in model.state_dict().items())


def test_several_chains_count_together():
    (one, loss), (two, _) = random_chain(3, 8, 0.5), random_chain(2, 8, 0.5)
    one.other = two
    (alone,) = error_bound(one, loss, [1])
    one.other = two  # two layers, of which the first has no state below that wants a gradient
    x = torch.ones(1, 8, dtype=torch.float64)
    (none,) = error_bound(one, lambda m: loss(m) + 0.0 * m.other.chain(x).sum(), [1])
    assert none.measured == pytest.approx(alone.measured)
    assert none.bound == pytest.approx(alone.bound)
    (both,) = error_bound(one, lambda m: loss(m) + m.other.chain(x).sum(), [1])
    assert 0 < both.measured < alone.measured  # the other is exact at k = 1 and adds to ||w||


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return 2 * h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        return 2 * w


class CustomLayer(nn.Linear):
    def forward(self, h):
        return h + Custom.apply(super().forward(h))


class Compiled(nn.Linear):
    @torch.compile(backend="aot_eager")
    def forward(self, h):
        return h + torch.tanh(super().forward(h))


class ForeignCarry(nn.Linear):
    """Its carry does not follow autograd, which must not pass for one of norm zero."""

    def forward(self, h):
        return h + super().forward(h)

    def carry(self, h_in, h_out):
        class Detached:
            def vecmat(self, w):
                return w.detach()

        return Detached()


def chain_of(layer):
    model = nn.Module()
    model.chain = hb.ResidualChain([layer])
    return model


def chain_loss(model):
    return model.chain(torch.ones(1, 3)).sum()


def chain_loss_of(models):
    """The chain behind a linear layer, so that its first state wants a gradient."""
    return models[1].chain(models[0](torch.ones(1, 3))).sum()


WRONG = [
    (lambda: error_bound(nn.GRU(2, 2), chain_loss), "GRU holds no ResidualChain"),
    (
        lambda: error_bound(nn.Sequential(hb.GRU(2, 2)), chain_loss),
        "model=Sequential has a recurrent layer, GRU; expected chains of layers",
    ),
    (
        lambda: error_bound(chain_of(nn.Linear(3, 3)), chain_loss, method=hb.Backprop()),
        r"method=Backprop\(\); expected Highway or FixedPoint",
    ),
    (
        lambda: error_bound(chain_of(nn.Linear(3, 3)), chain_loss, [-1]),
        "ks=-1; expected a whole number, at least 0",
    ),
    (
        lambda: error_bound(
            chain_of(nn.Linear(3, 3)), lambda m: sum(p.sum() for p in m.parameters())
        ),
        "no gradient went through the chains of Module",
    ),
    (
        lambda: error_bound(
            nn.ModuleList([nn.Linear(3, 3), chain_of(CustomLayer(3, 3))]), chain_loss_of
        ),
        "cannot be differentiated in the",
    ),
    (
        lambda: error_bound(
            nn.ModuleList([nn.Linear(3, 3), chain_of(Compiled(3, 3))]), chain_loss_of
        ),
        "cannot be differentiated in the",
    ),
    (
        lambda: error_bound(
            nn.ModuleList([nn.Linear(3, 3), chain_of(ForeignCarry(3, 3))]), chain_loss_of
        ),
        "cannot be differentiated in the",
    ),
    (
        lambda: bounds.remainder_bound([1.0], [1.0, 1.0], [1.0, 1.0], 0),
        "1 block_norms, 2 carry_norms and 1 layer_norms for 2 b_norms; expected 1 of each",
    ),
]


@pytest.mark.parametrize("wrong, line", WRONG)
def test_wrong_input_gets_one_clear_line(wrong, line):
    with pytest.raises(ValueError, match=line) as error:
        wrong()
    assert "\n" not in str(error.value)
