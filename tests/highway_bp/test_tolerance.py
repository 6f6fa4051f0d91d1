"""Highway(k, tolerance): stops when an iteration changes little, and says after how many."""

import copy

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.architectures import build
from tests.highway_bp.families import build as build_family
from tests.highway_bp.families import inputs
from tests.highway_bp.test_paths import chain_and_gradients, every_architecture


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
    for method, wanted in (
        (hb.Highway(2), 2),
        (hb.FixedPoint(3), 3),
        (hb.Highway(0), 0),
        (hb.Highway(1), 1),
        (hb.Backprop(), 0),
    ):
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
