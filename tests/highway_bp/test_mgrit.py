"""MGRIT against a naive multigrid on dense matrices, and its fixed point against autograd."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import highway_bp as hb
from tests.highway_bp import oracle, test_paths, test_recurrent, test_rnns
from tests.highway_bp.architectures import Permuted, Plain, ReluAfterSum, tanh
from tests.highway_bp.converted import relative_error

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
    *(hb.MGRIT(2, 2, 2, "F"), hb.MGRIT(0, 2, 4), hb.MGRIT(1, 2, 1)),
]


@test_paths.every_architecture
@test_paths.both_losses
def test_it_is_the_naive_multigrid(name, losses):
    ref = test_paths.reference(name)
    for method in METHODS:
        expected = ref.gradients(dense_mgrit(ref.J, ref.K, ref.b[losses], method))
        found = test_paths.library_gradients(name, method, losses)
        test_paths.assert_equal(found, expected, str(method))


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
        self.b = self.dense.cotangents(partial(test_paths.loss_of, "all"))

    def gradients(self, method) -> list[Tensor]:
        chain = hb.ResidualChain(self.layers, method)
        loss = test_paths.loss_of("all", chain(self.x, return_states=True))
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
        test_paths.assert_equal(long().gradients(method), long().expected(method), str(method))


# -- the fixed point ------------------------------------------------------------------------------


def needed(L: int, m: int, relaxation: str) -> int:
    """Cycles until exact: the guess is on one interval, each cycle on one more, or two."""
    return -(-(L // m - 1) // len(relaxation.replace("C", "")))


@every_relaxation
@pytest.mark.parametrize("coarsening, levels", [(2, 2), (2, 3), (2, 5), (4, 2), (6, 2), (11, 2)])
def test_it_is_exact_once_every_interval_has_had_its_turn(coarsening, levels, relaxation):
    exact = long().gradients(hb.Backprop())
    cycles = needed(Long.L, coarsening, relaxation)
    for more in (0, 1, 5):
        method = hb.MGRIT(cycles + more, coarsening, levels, relaxation)
        test_paths.assert_equal(long().gradients(method), exact, str(method))
    if cycles:
        fewer = hb.MGRIT(cycles - 1, coarsening, levels, relaxation)
        assert relative_error(long().gradients(fewer), exact) > 1e-9


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

OVER_TIME = [hb.MGRIT(0, 2), hb.MGRIT(0, 3, 2, "F"), hb.MGRIT(1, 2, 2, "F"), hb.MGRIT(0, 2, 3)]
OVER_TIME += [hb.MGRIT(1, 2, 3), hb.MGRIT(9, 2), hb.MGRIT(1, 4)]


@test_rnns.every_carry
@pytest.mark.parametrize("method", OVER_TIME, ids=str)
def test_over_time_it_is_the_chain_of_steps(monkeypatch, kind, carry, method):
    monkeypatch.setattr(test_rnns, "L", 7)  # no multiple of 2 or 3
    found, of_the_steps = test_rnns.gradients_over_time(kind, carry, method)
    test_rnns.assert_equal(found, of_the_steps, 1e-10)


@pytest.mark.parametrize("method", OVER_TIME, ids=str)
def test_a_cell_of_the_users_is_hb_gru(method):
    both = test_recurrent.with_a_gru_cell_and_of_hb_gru(method)
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)
