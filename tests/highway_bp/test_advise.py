"""`advise`: the rule on invented figures, the whole on small models, no trace, clear errors."""

import dataclasses

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.diagnostics.advice import Advice, Trial, choose
from highway_bp.diagnostics.advise import advise
from highway_bp.diagnostics.step_times import StepTimes
from tests.highway_bp.hub_models import build

CHAIN = StepTimes(
    forward=1.0,
    backward=2.0,
    cut_forward=1.0,
    head=0.2,
    iteration=0.9,
    parameters=1.2,
    layers=12,
    rounds=3,
)
RECURRENT = dataclasses.replace(CHAIN, iteration=0.2, parameters=0.4, layers=None)
COSINES = (0.5, 0.8, 0.95, 0.99)


def advice(times, cosines=COSINES, size=1, left_out=()):
    trials = tuple(Trial(hb.Highway(k, group_size=size), c, 1 - c) for k, c in enumerate(cosines))
    return Advice(times, trials, left_out, (2, 4), least_cosine=0.9, margin=0.05)


def test_the_fastest_that_is_exact_enough_wins():
    here = advice(RECURRENT).here
    assert here.method == advice(RECURRENT).method == hb.Highway(2)
    assert here.speed_up == pytest.approx(3 / (1 + 0.2 + 0.4 + 2 * 0.2))


def test_of_equal_times_the_larger_cosine_wins():
    trials = [Trial(hb.Highway(1, gamma), c, 0.1) for gamma, c in ((0.0, 0.93), ("auto", 0.95))]
    assert choose(trials, lambda _: 1.0, 2.0, 0.9, 0.05).method == hb.Highway(1, "auto")


@pytest.mark.parametrize("cosines", [(0.1, 0.6, 0.899), (float("nan"),), ()])
def test_backprop_where_nothing_is_exact_enough(cosines):
    here = advice(RECURRENT, cosines).here
    assert here.method == hb.Backprop() and here.speed_up == 1.0
    assert any(
        said in here.reason
        for said in ("0.899 at k = 2", "could be compared", "L or more, where it is exact")
    )


def test_backprop_unless_the_margin_is_kept():
    trials = [Trial(hb.Highway(0), 0.95, 0.1)]
    for seconds, method in ((0.96, hb.Backprop()), (0.95, hb.Highway(0))):
        assert choose(trials, lambda _, s=seconds: s, 1.0, 0.9, 0.05).method == method


def test_a_chain_of_modules_stays_with_backprop_on_one_device_and_gains_on_several():
    found = advice(CHAIN, size=3)
    assert found.method == hb.Backprop() and "takes 1.46 times" in found.here.reason
    assert found.for_devices(4).method == hb.Highway(2, group_size=3)
    assert found.for_devices(4).speed_up == pytest.approx(3 / (1.2 + 3.4 / 4))


def test_expected_time_on_devices_by_hand():
    def expected(k, size, devices, times=CHAIN):
        return times.on_devices(hb.Highway(k, group_size=size), devices)

    inside = 2.0 - 0.2 - 1.2
    assert expected(2, 3, 4) == pytest.approx(1.2 + (1.2 + 2 / 3 * inside + 2 * 0.9) / 4)
    assert expected(5, 1, 12) == pytest.approx(1.2 + (1.2 + 5 * 0.9) / 12)  # Eq. 13
    assert expected(2, 1, 4) == pytest.approx(1.2 + (1.2 + 2 * 0.9) / 4)  # three groups on each
    assert expected(0, 12, 8) == pytest.approx(1.2 + 1.2 + 11 / 12 * inside)  # one holds all
    uneven = dataclasses.replace(CHAIN, layers=9)  # five groups of two, the last of one
    assert expected(1, 2, 8, uneven) == pytest.approx(1.2 + 2 / 9 * (1.2 + inside / 2 + 0.9))


def test_time_here_counts_what_each_iteration_goes_through():
    assert CHAIN.here(hb.Highway(3)) == pytest.approx(2.4 + 0.9 * (1 + 11 / 12 + 10 / 12))
    assert RECURRENT.here(hb.Highway(3)) == pytest.approx(1.6 + 3 * 0.2)


def test_what_cannot_change_the_advice():
    found = advice(CHAIN, (0.5, 0.8))
    assert not found.may_win(hb.Highway(1))  # was not exact enough
    assert found.may_win(hb.Highway(1, gamma=0.5))
    assert found.may_win(hb.Highway(1, group_size=3))
    assert not found.may_win(hb.Highway(11))  # too slow anywhere
    assert not advice(CHAIN, COSINES).may_win(hb.Highway(3, "auto"))  # k = 2 is exact enough


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(
            nn.BatchNorm1d(width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.2)
        )

    def forward(self, h):
        return h + self.block(h)


def square(model, batch):
    out = model(batch)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def state_of(model):
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "methods": hb.method_state(model),
        "method": [getattr(m, "method", None) for m in model.modules()],
    }


def assert_untouched(model, before):
    after = state_of(model)
    for key in ("state", "grads"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])
    assert after["methods"] == before["methods"] and after["method"] == before["method"]


def test_a_chain_with_buffers_and_dropout_is_afterwards_what_it_was():
    model = hb.ResidualChain([Layer(8) for _ in range(4)], hb.Highway(1, "auto"))
    batch = torch.randn(16, 8)
    square(model, batch).backward()
    before = state_of(model)
    found = advise(model, batch, square, devices=(2, 4), ks=(0, 1, 3), seconds=60)
    assert_untouched(model, before)
    assert found.left_out == () and found.times.layers == 4
    exact = [t for t in found.trials if t.method.k == found.times.groups(t.method) - 1]
    assert {found.times.groups(t.method) for t in exact} == {2, 4}
    assert all(t.relative_error < 1e-5 for t in exact)  # P groups, k = P - 1
    assert all(t.relative_error > 1e-3 for t in found.trials if t not in exact)
    text = str(found)
    for part in ("cosine", "on 2  on 4", "On this device: ", "On 4 devices: ", "communication"):
        assert part in text


def test_a_gru_takes_numbers_for_gamma_and_no_devices():
    model = hb.GRU(4, 8, method=hb.Highway(2))
    batch = torch.randn(12, 3, 4)
    before = state_of(model)
    found = advise(model, batch, square, ks=(3, 0, 1, 1), seconds=60)
    assert_untouched(model, before)
    assert {t.method for t in found.trials} == {hb.Highway(k) for k in (0, 1, 3)}
    errors = {t.method.k: t.relative_error for t in found.trials}
    assert errors[0] > errors[3]
    assert "On this device: " in str(found) and "On 2" not in str(found)
    with pytest.raises(ValueError, match="devices=2 for a model with recurrent layers"):
        found.for_devices(2)


def test_a_converted_gpt2():
    case = build("gpt2", 4)
    model = hb.convert(case.model, hb.Highway(1))
    before = state_of(model)
    found = advise(model, case.batch, lambda m, batch: m(**batch).loss, ks=(0, 2, 3), seconds=60)
    assert_untouched(model, before)
    assert found.times.layers == 8
    curve = {
        (t.method.k, t.method.group_size): t.relative_error
        for t in found.trials
        if t.method.gamma == "auto"
    }
    assert set(curve) == {(0, 1), (0, 2), (0, 4), (2, 1), (2, 2), (3, 1), (3, 2)}
    assert curve[3, 2] < curve[2, 2] < curve[2, 1]
    assert isinstance(found.for_devices(2).method, hb.Backprop | hb.Highway)


def test_what_was_not_measured_is_named():
    model = hb.ResidualChain([Layer(4) for _ in range(4)])
    found = advise(model, torch.randn(8, 4), square, (), (0, 2), gammas=(0.0,), seconds=1e-9)
    assert [t.method for t in found.trials] == [hb.Highway(0)]  # its time was taken
    assert "Not measured, as the time was up: 4 groups: k = 2." in str(found)
    slow = advice(RECURRENT, left_out=(hb.Highway(9),))
    assert "the time was up: no groups: k = 9. None of them could change the advice." in str(slow)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ks=()), "ks is empty; expected at least one"),
        (dict(ks=(1, -1)), "ks=-1; expected a whole number, at least 0"),
        (dict(devices=(1,)), "devices=1; expected a whole number, at least 2"),
        (dict(devices=(2.5,)), r"devices=2\.5; expected a whole number"),
        (dict(least_cosine=0), "least_cosine=0; expected a number above 0 and at most 1"),
        (dict(least_cosine=1.1), r"least_cosine=1\.1; expected a number above 0"),
        (dict(margin=-0.1), r"margin=-0\.1; expected a number of at least 0"),
        (dict(seconds="all"), "seconds='all'; expected a number above 0"),
        (dict(gammas=()), "gammas=.. for a model; expected a number among them"),
        (dict(gammas=(1.5,)), r"gamma=1\.5; expected a number from 0 to 1"),
        (dict(loss_fn=lambda m, x: m(x)), r"returned shape \(2, 4\); expected a scalar"),
        (dict(loss_fn=lambda m, x: 1.0), "returned a float; expected a scalar tensor"),
        (dict(loss_fn=lambda m, x: m(x).detach().sum()), "the loss needs no gradient"),
        (dict(model=nn.Linear(4, 4)), "Linear holds no ResidualChain"),
        (dict(model=hb.GRU(4, 4), gammas=("auto",)), "gammas=.'auto',. for recurrent layers"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments, message):
    chain = hb.ResidualChain([nn.Linear(4, 4)])
    given = dict(model=chain, batch=torch.randn(2, 4), loss_fn=square) | arguments
    with pytest.raises((TypeError, ValueError), match=message) as error:
        advise(**given)
    assert "\n" not in str(error.value)
    assert chain.method == hb.Backprop()
