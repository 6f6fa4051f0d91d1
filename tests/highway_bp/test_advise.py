"""`advise`: the rule on invented times, the whole on small models, no trace, clear errors."""

import dataclasses

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.diagnostics.advice import Advice, StepTimes
from highway_bp.diagnostics.gradient_error import GradientError
from tests.highway_bp.architectures import Plain
from tests.highway_bp.families import build, inputs

pytestmark = pytest.mark.slow

CHAIN = StepTimes(
    forward=1.0, backward=2.0, cut_forward=1.0, head=0.2, parameters=1.2, iteration=0.9, layers=12
)
RECURRENT = dataclasses.replace(CHAIN, iteration=0.2, parameters=0.4, layers=None)


def advice(times, cosines=(0.5, 0.8, 0.95, 0.99), size=1):
    errors = {
        hb.Highway(k, group_size=size): GradientError(k, cosine, 1 - cosine, 0.0, {}, {})
        for k, cosine in enumerate(cosines)
    }
    return Advice(times, errors, left_out=(), devices=(), least_cosine=0.9)


def test_the_fastest_that_is_exact_enough_wins_and_of_equal_times_the_larger_cosine():
    found = advice(RECURRENT)
    choice = found.for_devices(1)
    assert choice.method == found.method == hb.Highway(2)
    assert choice.speed_up == pytest.approx(3 / (1 + 0.2 + 0.4 + 2 * 0.2))
    better = {hb.Highway(2, "auto"): GradientError(2, 0.96, 0.1, 0.0, {}, {})}
    assert dataclasses.replace(found, errors=found.errors | better).method == hb.Highway(2, "auto")
    cheap = dataclasses.replace(RECURRENT, iteration=0.05)  # k = 3 takes 1.03 times as long as 2
    assert advice(cheap).method == hb.Highway(3)


@pytest.mark.parametrize(
    ("cosines", "found"), [((0.1, 0.6, 0.899), "0.899"), ((float("nan"),), "unknown"), ((), "un")]
)
def test_backprop_where_nothing_is_exact_enough(cosines, found):
    choice = advice(RECURRENT, cosines).for_devices(1)
    assert choice.method == hb.Backprop() and choice.speed_up == 1.0
    reason = "no k below L measured has a cosine of 0.9 or more, the largest is"
    assert f"{reason} {found}" in choice.reason


@pytest.mark.parametrize(("head", "method"), [(1.41, hb.Highway(0)), (1.51, hb.Backprop())])
def test_backprop_unless_the_margin_is_kept(head, method):
    times = dataclasses.replace(RECURRENT, head=head)  # a step of 2.81 or 2.91 instead of 3
    assert advice(times, (0.95,)).method == method


def test_a_chain_of_modules_stays_with_backprop_on_one_device_and_gains_on_several():
    found = advice(CHAIN, size=3)
    assert found.method == hb.Backprop()
    assert "takes 1.46 times" in found.for_devices(1).reason
    assert found.for_devices(4).method == hb.Highway(2, group_size=3)
    assert found.for_devices(4).speed_up == pytest.approx(3 / (1.2 + 3.4 / 4))


def test_predicted_time_on_devices_by_hand():
    def predicted(k, size, devices, times=CHAIN):
        return times.of(hb.Highway(k, group_size=size), devices)

    inside = 2.0 - 0.2 - 1.2
    assert predicted(2, 3, 4) == pytest.approx(1.2 + (1.2 + 2 / 3 * inside + 2 * 0.9) / 4)
    assert predicted(5, 1, 12) == pytest.approx(1.2 + (1.2 + 5 * 0.9) / 12)  # Eq. 13
    assert predicted(2, 1, 4) == pytest.approx(1.2 + (1.2 + 2 * 0.9) / 4)  # three groups on each
    assert predicted(0, 12, 8) == pytest.approx(1.2 + 1.2 + 11 / 12 * inside)  # one holds all
    uneven = dataclasses.replace(CHAIN, layers=9)  # five groups of two, the last of one
    assert predicted(1, 2, 8, uneven) == pytest.approx(1.2 + 2 / 9 * (1.2 + inside / 2 + 0.9))


def test_time_here_counts_what_each_iteration_goes_through():
    assert CHAIN.of(hb.Highway(3)) == pytest.approx(2.4 + 0.9 * (1 + 11 / 12 + 10 / 12))
    assert RECURRENT.of(hb.Highway(3)) == pytest.approx(1.6 + 3 * 0.2)


def layer(n):
    parts = nn.BatchNorm1d(n), nn.Linear(n, n), nn.Tanh(), nn.Dropout(0.2)
    return Plain(nn.Sequential(*parts))


def square(model, batch):
    out = model(batch)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def state_of(model):
    """Weights, buffers, gradients, the random stream, estimates of gamma, the method."""
    grads = [p.grad for p in model.parameters()]
    tensors = [*model.state_dict().values(), *grads, torch.get_rng_state()]
    values = [None if t is None or t.is_meta else t.tolist() for t in tensors]
    return values, hb.method_state(model), hb.current_method(model)


def test_a_chain_with_buffers_and_dropout_is_afterwards_what_it_was():
    model = hb.ResidualChain([layer(8) for _ in range(4)], hb.Highway(1, "auto"))
    batch = torch.randn(16, 8)
    square(model, batch).backward()
    before = state_of(model)
    found = hb.advise(model, batch, square, devices=(2, 4), ks=(0, 1, 3), seconds=60)
    assert state_of(model) == before
    assert found.left_out == () and found.times.layers == 4
    exact = {m for m in found.errors if m.k == found.times.groups(m) - 1}
    assert {found.times.groups(m) for m in exact} == {2, 4}  # P groups, k = P - 1
    assert all((e.relative_error < 1e-5) == (m in exact) for m, e in found.errors.items())
    text = str(found)
    for part in ("cosine", "on 2  on 4", "On this device: ", "On 4 devices: ", "communication"):
        assert part in text


def test_a_gru_takes_numbers_for_gamma_and_no_devices():
    model = hb.GRU(4, 8, method=hb.Highway(2))
    batch = torch.randn(12, 3, 4)
    before = state_of(model)
    found = hb.advise(model, batch, square, ks=(3, 0, 1, 1), seconds=60)
    assert state_of(model) == before
    assert list(found.errors) == [hb.Highway(k) for k in (0, 1, 3)]
    assert found.errors[hb.Highway(0)].relative_error > found.errors[hb.Highway(3)].relative_error
    assert "On this device: " in str(found) and "On 2" not in str(found)
    with pytest.raises(ValueError, match="devices=2 for a model with recurrent layers"):
        found.for_devices(2)


def test_a_converted_gpt2():
    model, batch = hb.convert(build("gpt2", layers=8), hb.Highway(1)), inputs("gpt2")
    before = state_of(model)
    found = hb.advise(model, batch, lambda m, batch: m(**batch).loss, ks=(0, 2, 3), seconds=60)
    assert state_of(model) == before
    assert found.times.layers == 8
    curve = {
        (m.k, m.group_size): e.relative_error for m, e in found.errors.items() if m.gamma == "auto"
    }
    assert set(curve) == {(0, 1), (0, 2), (0, 4), (2, 1), (2, 2), (3, 1), (3, 2)}
    assert curve[3, 2] < curve[2, 2] < curve[2, 1]
    assert isinstance(found.for_devices(2).method, hb.Backprop | hb.Highway)


def test_what_was_not_measured_is_named():
    model = hb.ResidualChain([layer(4) for _ in range(4)])
    found = hb.advise(model, torch.randn(8, 4), square, (), (0, 2, 3), gammas=(0.0,), seconds=1e-9)
    assert list(found.errors) == [hb.Highway(0)]  # its gradient was there from timing
    assert found.left_out == (hb.Highway(2), hb.Highway(3))
    assert "Not measured, as the time was up: 2 methods with k = 2, 3." in str(found)


@pytest.mark.parametrize("progress", [True, None])
def test_progress_is_a_line_per_measurement_on_stderr(capsys, progress):
    model = hb.GRU(2, 3)
    hb.advise(model, torch.randn(5, 1, 2), square, ks=(0, 2), seconds=60, progress=progress)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("advise: ")]
    assert out == "" and len(lines) == len(err.splitlines())
    if progress:
        assert lines[0].startswith("advise: timing steps, round 1 of ")
        assert lines[-1].startswith("advise: k=2 gamma=0.0 group_size=1: cosine ")
    else:
        assert lines == []  # stderr is no terminal here


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ks=(1, -1)), "ks=-1; expected a whole number, at least 0"),
        (dict(ks=3), "ks=3; expected a list of whole numbers"),
        (dict(devices=(1,)), "devices=1; expected a whole number, at least 2"),
        (dict(least_cosine=1.1), r"least_cosine=1\.1; expected a number between 0 and 1"),
        (dict(seconds="all"), "seconds='all'; expected a number above 0"),
        (dict(gammas=()), "gammas=.. for a model; expected at least one number in it"),
        (dict(gammas="auto"), "gammas='auto'; expected a list of them"),
        (dict(gammas=(1.5,)), r"gamma=1\.5; expected a number from 0 to 1"),
        (dict(model=nn.Linear(4, 4)), "Linear holds no hb.ResidualChain"),
        (dict(model=hb.GRU(4, 4), gammas=("auto",)), "gammas=.'auto',. for recurrent layers"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments, message):
    chain = hb.ResidualChain([nn.Linear(4, 4)])
    given = dict(model=chain, batch=torch.randn(2, 4), loss_fn=square) | arguments
    with pytest.raises((TypeError, ValueError), match=message) as error:
        hb.advise(**given)
    assert "\n" not in str(error.value)
    assert chain.method == hb.Backprop()
