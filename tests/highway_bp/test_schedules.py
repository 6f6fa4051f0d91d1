"""Schedules: the method of every step, the adaptive ladder, and what is refused."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import highway_bp as hb
from highway_bp.diagnostics.gradient_error import GradientError
from highway_bp.schedules import Adaptive, BpEvery, Constant, Cosine, Linear, Milestones
from tests.highway_bp.architectures import Plain, tanh

BASE = hb.Highway(7, gamma=0.2)


def ks(schedule, steps: int) -> list:
    """k of every step, "bp" where it is exact."""
    assert isinstance(schedule, hb.schedules.Schedule)
    methods = [schedule.method_for(step, steps) for step in range(steps)]
    assert all(m == hb.Backprop() or m.gamma == 0.2 for m in methods)
    return [getattr(m, "k", "bp") for m in methods]


FOUR = (1, 2, 5, "bp")


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Constant(BASE), [7, 7, 7]),
        (Constant(hb.Backprop()), ["bp"]),
        (Milestones(BASE, FOUR, (0.2, 0.5, 0.9)), [1, 1, 2, 2, 2, 5, 5, 5, 5, "bp"]),
        (Milestones(BASE, FOUR, (2, 5, 9)), [1, 1, 2, 2, 2, 5, 5, 5, 5, "bp"]),
        (Linear(BASE, 0, 2), [0, 1, 1, 2, 2]),  # the same time on every k
        (Linear(BASE, 3, 1, exact_from=0.5), [3, 2, 1, "bp", "bp", "bp"]),
        (BpEvery(BASE, 3), [7, 7, "bp", 7, 7, "bp", 7]),
    ],
    ids=str,
)
def test_the_k_of_every_step(schedule, wanted):
    assert ks(schedule, len(wanted)) == wanted


def test_cosine_is_slow_at_both_ends():
    found = ks(Cosine(BASE, 0, 4), 101)
    assert found[0] == 0 and found[50] == 2 and found[100] == 4
    assert found.count(0) > found.count(1) and found.count(4) > found.count(3)


@given(
    st.integers(1, 300),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([None, 0.3, 0.9]),
    st.sampled_from([Linear, Cosine]),
)
def test_ramps_stay_between_their_ends_and_never_turn(steps, start, end, exact_from, kind):
    found = ks(kind(BASE, start, end, exact_from), steps)
    ramp = [k for k in found if k != "bp"]
    assert found == ramp + ["bp"] * (len(found) - len(ramp))
    assert len(ramp) == (steps if exact_from is None else round(exact_from * steps))
    assert ramp == sorted(ramp, reverse=start > end)
    if ramp:
        assert ramp[0] == start and min(ramp) >= min(start, end) and max(ramp) <= max(start, end)


class Errors:
    """Gradient errors as told: ``table[k]`` is the relative error; notes what was asked."""

    def __init__(self, table: dict[int, float]):
        self.table, self.asked = table, []

    def __call__(self, method, ks):
        assert method == BASE
        self.asked.append(list(ks))
        return [
            GradientError(k, 1 - self.table[k], self.table[k], self.table[k], {}, {}) for k in ks
        ]


def chosen(adaptive, table, step=0, steps=10_000):
    assert isinstance(adaptive, hb.schedules.Schedule)
    measure = Errors(table)
    return getattr(adaptive.method_for(step, steps, measure), "k", "bp"), measure.asked


@pytest.mark.parametrize(("signal", "step"), [("relative_error", 0), ("cosine", 7)])
def test_adaptive_starts_on_the_smallest_k_within_the_tolerance(signal, step):
    """Of the whole ladder, whenever the first measurement comes."""
    adaptive = Adaptive(BASE, tolerance=0.3, ks=(0, 1, 3), signal=signal)
    assert chosen(adaptive, {0: 0.5, 1: 0.29, 3: 0.1}, step) == (1, [[0, 1, 3]])
    assert adaptive.errors == [(0, 0.5), (1, 0.29), (3, 0.1)] or signal == "cosine"


def test_adaptive_is_exact_where_no_rung_is_enough_and_comes_back():
    adaptive = Adaptive(BASE, ks=(0, 1, 3))
    assert chosen(adaptive, {0: 0.9, 1: 0.9, 3: 0.8})[0] == "bp"
    assert chosen(adaptive, {0: 0.9, 1: 0.9, 3: 0.2}, adaptive.next_check) == (3, [[3]])


def test_adaptive_climbs_and_descends_one_rung_at_a_time():
    adaptive = Adaptive(BASE, ks=(0, 1, 2, 3, 5))
    good = dict.fromkeys(range(6), 0.1)
    assert chosen(adaptive, good)[0] == 0
    bad_low = {0: 0.9, 1: 0.9, 2: 0.1, 3: 0.1, 5: 0.1}
    assert chosen(adaptive, bad_low, adaptive.next_check) == (1, [[0, 1]])
    assert chosen(adaptive, bad_low, adaptive.next_check) == (2, [[0, 1, 2]])
    assert chosen(adaptive, bad_low, adaptive.next_check) == (2, [[1, 2, 3]])
    assert chosen(adaptive, good, adaptive.next_check) == (1, [[1, 2, 3]])


def test_the_increment_of_the_rung_above_is_a_signal_too():
    adaptive = Adaptive(BASE, ks=(0, 1, 2), signal="increment")
    assert chosen(adaptive, {0: 1.0, 1: 0.5, 2: 0.2})[0] == 1  # the step to 2 changes 0.2


def test_measurements_keep_to_the_budget():
    adaptive, steps, work = Adaptive(BASE, budget=0.02, exact_from=0.95), 20_000, 0.0
    measure = Errors({0: 0.5, 1: 0.4, 2: 0.35, 3: 0.2, 5: 0.1, 8: 0.0})
    for step in range(steps):
        adaptive.method_for(step, steps, measure)
    for asked in measure.asked:
        work += 1 + sum(1 + k / 3 for k in asked)
    assert 0.5 * 0.02 < work / steps < 0.02 * 1.05


def test_between_measurements_and_at_the_end_nothing_is_measured():
    adaptive = Adaptive(BASE, exact_from=0.9)
    errors = dict.fromkeys(range(9), 0.1)
    chosen(adaptive, errors)
    assert chosen(adaptive, errors, 1) == (0, [])
    assert chosen(adaptive, errors, 9000) == ("bp", [])


def test_the_state_goes_into_a_checkpoint_and_back():
    errors = {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.1, 5: 0.1, 8: 0.1}
    one, other = Adaptive(BASE), Adaptive(BASE)
    chosen(one, errors)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert chosen(one, errors, 5) == chosen(other, errors, 5) == (3, [])
    fixed = Milestones(BASE)
    fixed.load_state_dict(fixed.state_dict())
    assert fixed == Milestones(BASE)


def test_a_real_measurement_drives_the_ladder():
    torch.manual_seed(0)
    chain = hb.ResidualChain(Plain(tanh(6)) for _ in range(8))
    x = torch.randn(5, 6)

    def measure(method, ks):
        return hb.gradient_error(chain, lambda m: m(x).square().mean(), ks, method)

    adaptive = Adaptive(hb.Highway(0), tolerance=0.2)
    method = adaptive.method_for(0, 1000, measure)
    exact = {k: e for k, e in adaptive.errors}
    assert method.k == min(k for k, error in exact.items() if error <= 0.2)
    assert exact[8] < 1e-6 < 0.2 < exact[0]


ON_BASE = partial(Milestones, BASE)
NO_ITERATIONS = "method=Backprop(); expected one with iterations, such as Highway(k)"
REFUSED = {  # other lines are in tests/errors.md
    "at=[5, 0.2]; expected all fractions, or all steps": lambda: ON_BASE((1, 2, 3), (5, 0.2)),
    "at=[1.5]; expected fractions below 1, or whole steps": lambda: ON_BASE((1, 2), (1.5,)),
    "at=[0]; expected fractions below 1, or steps": lambda: ON_BASE((1, 2), (0,)),
    "at=0.5; expected a list": lambda: ON_BASE(at=0.5),
    "ks=2.5; expected a whole number, at least 0": lambda: ON_BASE((1, 2.5), (0.5,)),
    NO_ITERATIONS: lambda: Milestones(hb.Backprop()),
    "end=-1; expected a whole number, at least 0": lambda: Linear(BASE, 0, -1),
    "exact_from=1.0; expected a number between 0 and 1": lambda: Cosine(BASE, exact_from=1.0),
    "tolerance=0; expected a number between 0 and 1": lambda: Adaptive(BASE, tolerance=0),
    "tolerance='low'; expected a number between 0 and 1": lambda: Adaptive(BASE, tolerance="low"),
    "ks=[3, 1]; expected at least two increasing numbers": lambda: Adaptive(BASE, ks=(3, 1)),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_fit_is_told_in_one_line(line):
    with pytest.raises((TypeError, ValueError)) as told:
        REFUSED[line]()
    assert str(told.value) == line
