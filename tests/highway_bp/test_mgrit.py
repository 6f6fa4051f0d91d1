"""MGRIT against a naive multigrid on dense matrices, and its fixed point against autograd."""

import itertools
import multiprocessing
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import highway_bp as hb
from highway_bp.mgrit import Grid, _improved
from tests.highway_bp import oracle, test_recurrent, test_rnns, test_sharded
from tests.highway_bp.architectures import Permuted, Plain, ReluAfterSum, tanh
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_paths import (
    assert_equal,
    both_losses,
    every_architecture,
    library_gradients,
    loss_of,
    reference,
)
from tests.train_cli import only_run, row_of

every_relaxation = pytest.mark.parametrize("relaxation", ["F", "FCF"])

# -- the naive twin -------------------------------------------------------------------------------


class Level:
    """One grid as dense matrices, in its own numbering: w_{i-1} = b_{i-1} + w_i A_i, i = N .. 1.

    Index 0 of J, K and A holds None, as in the oracle. Nothing is done at once: intervals and
    points come one after another, every relaxation is a substitution with C-points held.
    """

    def __init__(self, J, K, m: int):
        self.J, self.K, self.m, self.N = J, K, m, len(J) - 1
        self.A = [None, *(J_i + K_i for J_i, K_i in zip(J[1:], K[1:], strict=True))]
        self.C = [i for i in range(self.N + 1) if (self.N - i) % m == 0]  # C-points, ascending

    def coarse(self) -> "Level":
        J, K = [None], [None]
        for start, end in zip(self.C, self.C[1:], strict=False):
            K_most = torch.eye(self.K[end].shape[0], dtype=torch.float64)
            for i in range(end, start + 1, -1):
                K_most = K_most @ self.K[i]
            K.append(K_most @ self.K[start + 1])
            J.append(K_most @ (self.m * self.J[start + 1]))
        return Level(J, K, self.m)

    def f_relaxed(self, w, b):
        w = list(w)
        for i in reversed(range(self.N)):
            if i not in self.C:
                w[i] = b[i] + w[i + 1] @ self.A[i + 1]
        return w

    def c_relaxed(self, w, b):
        return [
            b[i] + w[i + 1] @ self.A[i + 1] if i in self.C and i < self.N else w[i]
            for i in range(self.N + 1)
        ]

    def residuals(self, w, b):
        """At every point; that of the last is zero."""
        return [*(b[i] + w[i + 1] @ self.A[i + 1] - w[i] for i in range(self.N)), 0 * w[-1]]

    def substituted(self, b):
        w = list(b)
        for i in reversed(range(self.N)):
            w[i] = b[i] + w[i + 1] @ self.A[i + 1]
        return w

    def cycled(self, w, b, levels: int, relaxation: str):
        if levels == 1 or len(self.C) == 1:
            return self.substituted(b)
        w = self.f_relaxed(w, b)
        if relaxation == "FCF":
            w = self.f_relaxed(self.c_relaxed(w, b), b)
        r = [self.residuals(w, b)[i] for i in self.C]
        e = self.coarse().cycled(r, r, levels - 1, relaxation)
        for i, e_i in zip(self.C, e, strict=True):
            w[i] = w[i] + e_i
        return self.f_relaxed(w, b)


def dense_mgrit(J, K, b, method: hb.MGRIT) -> list[Tensor]:
    level = Level(J, K, method.coarsening)
    w = level.cycled(b, b, method.levels, "F")
    for _ in range(method.cycles):
        w = level.cycled(w, b, method.levels, method.relaxation)
    return w


METHODS = [
    *(
        hb.MGRIT(cycles, coarsening, levels, relaxation)
        for coarsening, levels in ((2, 2), (2, 3), (3, 2), (4, 2))
        for cycles, relaxation in ((0, "F"), (1, "F"), (1, "FCF"))
    ),
    hb.MGRIT(2, 2, 2, "F"),
    hb.MGRIT(0, 2, 4),
    hb.MGRIT(1, 2, 1),
]


@every_architecture
@both_losses
def test_it_is_the_naive_multigrid(name, losses):
    ref = reference(name)
    for method in METHODS:
        expected = ref.gradients(dense_mgrit(ref.J, ref.K, ref.b[losses], method))
        assert_equal(library_gradients(name, method, losses), expected, str(method))


class Long:
    """23 layers, carries that do not commute among them, and a loss on every state."""

    L = 23

    def __init__(self):
        torch.manual_seed(0)
        kinds = [Plain, ReluAfterSum, Plain, partial(Permuted, channels=3)]
        self.layers = [kinds[i % 4](tanh(3)).double() for i in range(self.L)]
        self.x = torch.randn(2, 3, dtype=torch.float64)
        self.leaves = list(nn.ModuleList(self.layers).parameters())
        self.dense = oracle.DenseChain(self.layers, self.x)
        self.b = self.dense.cotangents(partial(loss_of, "all"))

    def gradients(self, method) -> list[Tensor]:
        chain = hb.ResidualChain(self.layers, method)
        loss = loss_of("all", chain(self.x, return_states=True))
        return list(torch.autograd.grad(loss, self.leaves))

    def expected(self, method) -> list[Tensor]:
        w = dense_mgrit(self.dense.J, self.dense.K, self.b, method)
        return self.dense.leaf_gradients(w, self.leaves)


long = cache(Long)


@every_relaxation
@pytest.mark.parametrize("coarsening, levels", [(2, 2), (2, 4), (2, 9), (3, 3), (5, 2), (7, 3)])
def test_on_a_long_chain_too(coarsening, levels, relaxation):
    for cycles in range(4):
        method = hb.MGRIT(cycles, coarsening, levels, relaxation)
        assert_equal(long().gradients(method), long().expected(method), str(method))


# -- the fixed point ------------------------------------------------------------------------------


def needed(L: int, m: int, relaxation: str) -> int:
    """Cycles until exact: the guess is on one interval, each cycle on one more, or two."""
    return -(-(L // m - 1) // len(relaxation.replace("C", "")))


def error(gradients: list[Tensor], exact: list[Tensor]) -> float:
    difference = sum((g - e).square().sum() for g, e in zip(gradients, exact, strict=True))
    return (difference / sum(e.square().sum() for e in exact)).sqrt().item()


@every_relaxation
@pytest.mark.parametrize("coarsening, levels", [(2, 2), (2, 3), (2, 5), (4, 2), (6, 2), (11, 2)])
def test_it_is_exact_once_every_interval_has_had_its_turn(coarsening, levels, relaxation):
    exact = long().gradients(hb.Backprop())
    cycles = needed(Long.L, coarsening, relaxation)
    for more in (0, 1, 5):
        method = hb.MGRIT(cycles + more, coarsening, levels, relaxation)
        assert_equal(long().gradients(method), exact, str(method))
    if cycles:
        fewer = hb.MGRIT(cycles - 1, coarsening, levels, relaxation)
        assert error(long().gradients(fewer), exact) > 1e-9


@pytest.mark.parametrize("method", [hb.MGRIT(0, 24), hb.MGRIT(0, 12), hb.MGRIT(0, 2, 1)], ids=str)
def test_one_grid_or_one_interval_is_exact_at_once(method):
    assert_equal(long().gradients(method), long().gradients(hb.Backprop()), str(method))


class Poor:
    """A system whose coarse steps lead nowhere."""

    def __init__(self, system):
        self.system = system

    def __getattr__(self, name: str):
        return getattr(self.system, name)

    def relax(self, w, b, n: int, states: range):
        if n == 1:
            return self.system.relax(w, b, n, states)
        return [b_i if i in states else w_i for i, (w_i, b_i) in enumerate(zip(w, b, strict=True))]

    def residual(self, w, b, n: int, states: range):
        if n == 1:
            return self.system.residual(w, b, n, states)
        rest = [b_i if w_i is None else b_i - w_i for w_i, b_i in zip(w, b, strict=True)]
        return [r_i if i in states else None for i, r_i in enumerate(rest)]


class Solved(hb.MGRIT):
    """MGRIT by another function of method and system."""

    by = staticmethod(hb.MGRIT.solve)

    def solve(self, system):
        return self.by(self, system)


@every_relaxation
@pytest.mark.parametrize("levels", [2, 3])
def test_the_coarse_steps_do_not_decide_where_it_ends(levels, relaxation):
    class Lost(Solved):
        by = staticmethod(lambda method, system: hb.MGRIT.solve(method, Poor(system)))

    exact, cycles = long().gradients(hb.Backprop()), needed(Long.L, 4, relaxation)
    assert_equal(long().gradients(Lost(cycles, 4, levels, relaxation)), exact, "poor")
    assert error(long().gradients(Lost(cycles - 1, 4, levels, relaxation)), exact) > 1e-2


@every_relaxation
@pytest.mark.parametrize("coarsening, levels", [(2, 4), (3, 2), (5, 2)])
def test_a_cycle_leaves_the_exact_gradient_as_it_is(coarsening, levels, relaxation):
    def one_more(method, system):
        w, b = hb.MGRIT(levels=1).solve(system), system.cotangents()
        grid = Grid(system.length, 1, method.coarsening, method.levels)
        return _improved(system, grid, w, b, method.relaxation)

    class Continued(Solved):
        by = staticmethod(one_more)

    method = Continued(1, coarsening, levels, relaxation)
    assert_equal(long().gradients(method), long().gradients(hb.Backprop()), "after one cycle")


class EulerStep(nn.Module):
    """h + dt tanh(h W), its weights between A and B by time t, as are those of a smooth ODE."""

    def __init__(self, A: Tensor, B: Tensor, t: float, dt: float):
        super().__init__()
        self.W, self.dt = nn.Parameter(A * (1 - t) + B * t), dt

    def forward(self, h):
        return h + self.dt * torch.tanh(h @ self.W)


@every_relaxation
@pytest.mark.parametrize("levels", [2, 3])
def test_every_cycle_takes_most_of_the_error_of_small_steps(levels, relaxation):
    L = 67
    A, B = torch.randn(2, 6, 6, dtype=torch.float64)
    chain = hb.ResidualChain(EulerStep(A, B, i / L, 1 / L) for i in range(L))
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradients(method):
        chain.method = method
        return list(torch.autograd.grad(torch.sin(chain(x)).sum(), list(chain.parameters())))

    exact = gradients(hb.Backprop())
    errors = [error(gradients(hb.MGRIT(c, 4, levels, relaxation)), exact) for c in range(5)]
    assert errors[0] < 0.15
    for before, after in itertools.pairwise(errors):
        assert after < before / 10


# -- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, passes",
    [
        (hb.MGRIT(0, 4), 3 + 1 + 4 + 3),  # N = 5: F, residual, coarse steps but the first, F
        (hb.MGRIT(1, 4, 2, "F"), 11 + 1 + 4 + 3),
        (hb.MGRIT(1, 4, 2, "FCF"), 11 + 1 + 3 + 1 + 4 + 3),
        (hb.MGRIT(9, 4, 2, "FCF"), 11 + 2 * (1 + 3 + 1 + 4 + 3)),  # exact after two
        (hb.MGRIT(0, 2, 3), 1 + 1 + (1 + 1 + 4 + 1) + 1),  # the middle grid's 11 steps, 5 by twos
        (hb.MGRIT(1, 2, 3, "FCF"), 10 + 1 + 1 + 1 + (1 + 1 + 1 + 1 + 4 + 1) + 1),
        (hb.MGRIT(3, 24), 23),
        (hb.MGRIT(3, 4, 1), 23),
    ],
    ids=str,
)
def test_iterations_are_the_passes_that_wait_for_each_other(method, passes):
    chain = hb.ResidualChain(long().layers, method)
    chain(long().x).sum().backward()
    assert hb.iterations(chain) == passes


# -- other systems --------------------------------------------------------------------------------

OVER_TIME = [
    hb.MGRIT(0, 2),
    hb.MGRIT(0, 3, 2, "F"),
    hb.MGRIT(1, 2, 2, "F"),
    hb.MGRIT(0, 2, 3),
    hb.MGRIT(1, 2, 3),
    hb.MGRIT(9, 2),
    hb.MGRIT(1, 4),
]


@test_rnns.every_carry
@pytest.mark.parametrize("method", OVER_TIME, ids=str)
def test_over_time_it_is_the_chain_of_steps(monkeypatch, kind, carry, method):
    monkeypatch.setattr(test_rnns, "L", 7)  # no multiple of 2 or 3
    found, of_the_steps = test_rnns.gradients_over_time(kind, carry, method)
    test_rnns.assert_equal(found, of_the_steps, 1e-10)


@pytest.mark.parametrize("method", OVER_TIME, ids=str)
def test_a_cell_of_the_users_is_hb_gru(method):
    of_the_cell, of_hb_gru = test_recurrent.with_a_gru_cell_and_of_hb_gru(method)
    for a, b in zip(of_the_cell, of_hb_gru, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def cases(P: int):
    """Two coarse steps of 3 or of 2 groups, three grids."""
    methods = [hb.MGRIT(0, 3), hb.MGRIT(1, 2, 2, "F"), hb.MGRIT(1, 2, 2, "FCF"), hb.MGRIT(0, 2, 3)]
    for kind, method in itertools.product(("gpt", "every carry"), methods):
        for micro_batches in (1, 2):
            yield kind, method, kind == "every carry", {"micro_batches": micro_batches}


gpt = test_sharded.layers_of


def layers_of(kind: str) -> list[nn.Module]:
    if kind == "gpt":
        return gpt(kind)
    torch.manual_seed(0)
    kinds = [getattr(test_sharded, name) for name in ("Relu", "Halved", "Turned")]
    return [kinds[i % 3](8).double() for i in range(7)]


def compared_with_one(rank: int, P: int) -> tuple[int, list[str]]:
    test_sharded.cases, test_sharded.layers_of = cases, layers_of
    return test_sharded.compared_with_one(rank, P)


def test_on_several_processes_it_is_that_of_the_grouped_chain(tmp_path):
    P = 6
    multiprocessing.set_forkserver_preload([__name__])  # imports done once
    for compared, wrong in on_ranks(P, compared_with_one, tmp_path, P, start_method="forkserver"):
        assert wrong == [] and compared > 20


def test_in_bfloat16():
    chain = hb.ResidualChain(Plain(tanh(8)) for _ in range(9))
    x = torch.randn(4, 8)
    exact = torch.autograd.grad(torch.sin(chain(x)).sum(), list(chain.parameters()))
    chain.method = hb.MGRIT(9, 2)
    with torch.autocast("cpu", torch.bfloat16):
        h = chain(x)
    found = torch.autograd.grad(torch.sin(h).sum(), list(chain.parameters()))
    assert error(list(found), list(exact)) < 0.05


def test_a_run_of_it(train, runs):
    assert train("grad=mgrit", "grad.coarsening=2", "steps=1").code == 0
    row = row_of(only_run(runs))
    assert (row["grad"], row["k"], row["L"]) == ("mgrit", None, 3)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"cycles": -1}, ValueError, "cycles=-1; expected a whole number, at least 0"),
        ({"cycles": 1.5}, TypeError, "cycles=1.5; expected a whole number"),
        ({"coarsening": 1}, ValueError, "coarsening=1; expected a whole number, at least 2"),
        ({"coarsening": None}, TypeError, "coarsening=None; expected a whole number"),
        ({"levels": 0}, ValueError, "levels=0; expected a whole number, at least 1"),
        ({"levels": True}, TypeError, "levels=True; expected a whole number"),
        ({"relaxation": "FC"}, ValueError, "relaxation='FC'; expected one of F, FCF"),
        ({"relaxation": None}, ValueError, "relaxation=None; expected one of F, FCF"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        hb.MGRIT(**arguments)
