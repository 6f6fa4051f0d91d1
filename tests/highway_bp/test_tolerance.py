"""Highway(k, tolerance) stops when an iteration changes little, and says after how many;
gamma="auto" is held to its definition and to the sum over paths."""

import copy

import pytest
import torch

import highway_bp as hb
from highway_bp.auto_gamma import smallest_block
from tests.highway_bp import oracle
from tests.highway_bp.architectures import build
from tests.highway_bp.families import build as build_family
from tests.highway_bp.families import inputs
from tests.highway_bp.test_paths import chain_and_gradients, every_architecture, reference


@every_architecture
@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_it_is_the_gradient_of_as_many_iterations_as_it_took(name, tolerance):
    L = len(build(name).layers)
    chain, found = chain_and_gradients(name, hb.Highway(L, tolerance=tolerance), "all")
    taken = max(chain.iterations)
    other, wanted = chain_and_gradients(name, hb.Highway(taken), "all")
    assert taken == max(other.iterations) <= L
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_it_stops_after_the_first_iteration_that_changes_less():
    torch.manual_seed(0)
    model, batch = hb.convert(build_family("gpt2", layers=8), hb.Backprop()), inputs("gpt2")
    taken = {}
    for tolerance in (0.5, 0.2, 1e-6):
        hb.set_method(model, hb.Highway(8, tolerance=tolerance))
        model(**batch).loss.backward()
        taken[tolerance] = hb.iterations(model)
    assert 1 <= taken[0.5] < taken[0.2] < taken[1e-6] <= 8


@pytest.mark.parametrize("layer", [hb.GRU, hb.LSTM])
@pytest.mark.parametrize("group_size", [1, 4])
def test_recurrent_layers_stop_too(layer, group_size):
    torch.manual_seed(0)
    rnn = layer(3, 8, method=hb.Highway(40, group_size=group_size, tolerance=1e-3)).double()
    other, x = copy.deepcopy(rnn), torch.randn(40, 2, 3).double()
    rnn(x)[0].square().sum().backward()
    taken = hb.iterations(rnn)
    assert hb.chain_length(rnn) == 40 and 1 <= taken < 40 // group_size
    other.method = hb.Highway(taken, group_size=group_size)
    other(x)[0].square().sum().backward()
    grads = ([p.grad for p in model.parameters()] for model in (rnn, other))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_iterations_are_those_of_the_last_backward_pass():
    torch.manual_seed(0)
    rnn, x = hb.GRU(3, 4, method=hb.Highway(2)), torch.randn(9, 2, 3)
    iterated = {hb.Highway(2): 2, hb.FixedPoint(3): 3, hb.Highway(0): 0, hb.Highway(1): 1}
    for method, wanted in {**iterated, hb.Backprop(): 0}.items():
        rnn.method = method
        rnn(x)[0].sum().backward()
        assert hb.iterations(rnn) == wanted


def test_evaluation_and_measuring_in_between_change_no_count():
    torch.manual_seed(0)
    rnn = hb.GRU(3, 4, num_layers=2, bidirectional=True, method=hb.Highway(2))
    x = torch.randn(9, 2, 3)
    rnn(x)[0].sum().backward()
    assert rnn.iterations == [2, 2, 2, 2]
    with torch.no_grad():
        rnn(x)
    hb.gradient_error(rnn, lambda m: m(x)[0].sum(), ks=(0, 5))
    assert hb.iterations(rnn) == 2


def test_a_gradient_of_zero_needs_one_iteration():
    a = build("scalar")
    chain = hb.ResidualChain(a.layers, hb.Highway(len(a.layers), tolerance=0.1))
    (0.0 * chain(a.x)).sum().backward()
    assert chain.iterations == [1]


# -- gamma="auto" ---------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("k", [0, 1, 3])
def test_gradients_are_the_path_sum_with_the_estimated_gammas(name, k):
    known = reference(name)
    method = hb.Highway(min(k, known.L), gamma="auto")
    chain, found = chain_and_gradients(name, method, "all")
    gammas = list(chain.gammas.values.values())
    J = [None, *(J + g * K for g, J, K in zip(gammas, known.J[1:], known.K[1:], strict=True))]
    K = [None, *((1 - g) * K for g, K in zip(gammas, known.K[1:], strict=True))]
    wanted = known.gradients(oracle.highway(J, K, known.b["all"], min(k, known.L)))
    assert len(gammas) == known.L
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w.reshape(g.shape), rtol=1e-9, atol=1e-9)


def test_the_estimate_is_the_scalar_that_leaves_the_smallest_block():
    torch.manual_seed(0)
    J, K = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    J -= 0.7 * K
    like, generator = torch.zeros(8).double(), torch.Generator().manual_seed(0)
    found = smallest_block(lambda z: z @ J, lambda z: z @ K, like, 20_000, generator)
    exact = -(J * K).sum() / (K * K).sum()
    assert found == pytest.approx(exact.item(), abs=0.03)
    norms = [(J + g * K).norm() for g in (exact - 0.1, exact, exact + 0.1)]
    assert norms[1] < min(norms[0], norms[2])


def trained_twice(chain, x, times):
    seen = []
    for _ in range(times):
        chain(x).square().sum().backward()
        seen.append(list(chain.gammas.values.values()))
        with torch.no_grad():
            for p in chain.parameters():
                p.mul_(1.1)
    return seen


def test_estimates_are_refreshed_at_the_interval_and_kept_in_between():
    torch.manual_seed(0)
    a = build("scalar")
    chain = hb.ResidualChain(a.layers, hb.Highway(1, gamma=hb.AutoGamma(probes=2, every=3)))
    before = torch.get_rng_state()
    seen = trained_twice(chain, a.x, 7)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_of_a_method_goes_into_a_checkpoint_and_back():
    a = build("scalar")
    method = hb.Highway(1, gamma=hb.AutoGamma(every=3))
    chain = hb.ResidualChain(a.layers, method)
    trained_twice(chain, a.x, 2)
    again = copy.deepcopy(chain)
    again.gammas.reset()
    hb.load_method_state(again, hb.method_state(chain))
    assert trained_twice(chain, a.x, 5) == trained_twice(again, a.x, 5)
    with pytest.raises(ValueError, match="state of 0 chains; expected 1"):
        hb.load_method_state(chain, [])
