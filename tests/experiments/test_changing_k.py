"""Schedules and diagnostics in training: recorded, and without a trace."""

import pytest

from tests.train_cli import TINY_GPT, assert_same, numbers, only_run, records_of, row_of

pytestmark = pytest.mark.slow

TEXT, BP = ("experiment=topics_tiny", "steps=8"), None


def steps_of(folder) -> list[dict]:
    return [r for r in records_of(folder) if "train_loss" in r]


@pytest.mark.parametrize(
    ("schedule", "ks"),
    [
        ("milestones schedule.ks=[0,2,bp] schedule.at=[0.25,0.75]", [0, 0, 2, 2, 2, 2, BP, BP]),
        ("milestones schedule.ks=[0,2] schedule.at=[6]", [0] * 6 + [2] * 2),
        ("linear schedule.end=2 schedule.exact_from=null", [0, 0, 1, 1, 1, 1, 2, 2]),
        ("cosine schedule.end=3 schedule.exact_from=0.5", [0, 1, 2, 3, BP, BP, BP, BP]),
        ("bp_every schedule.n=4 k=1", [1, 1, 1, BP, 1, 1, 1, BP]),
    ],
)
def test_the_k_in_force_is_recorded_and_counted(train, runs, schedule, ks):
    assert train(*TEXT, *f"schedule={schedule}".split()).code == 0
    folder = only_run(runs)
    row, records = row_of(folder), steps_of(folder)
    assert [r["k"] for r in records] == ks
    assert [r["iterations"] for r in records] == [k or 0 for k in ks]
    assert row["block_passes"] == sum(1 if k is None else k for k in ks)
    assert row["sequential_passes"] == sum(16 if k is None else k for k in ks)  # L = 16 steps
    assert row["k"] is None and row["schedule"].startswith(schedule.split()[0])


def test_layers_of_a_group_follow_each_other(train, runs):
    train("steps=2", "k=1", "grad.group_size=2")  # L = 3 residual blocks
    row = row_of(only_run(runs))
    assert (row["block_passes"], row["sequential_passes"]) == (2, 4)


def test_a_tolerance_stops_iterations_and_the_record_says_when(train, runs):
    train(*TEXT, "k=16", "grad.tolerance=0.2")
    taken = [r["iterations"] for r in steps_of(only_run(runs))]
    assert all(1 <= n < 16 for n in taken)
    assert row_of(only_run(runs))["block_passes"] == sum(taken)


def test_what_an_adaptive_schedule_measures_is_counted(train, runs):
    adaptive = ("schedule=adaptive", "schedule.ks=[0,1,3]", "schedule.exact_from=0.99")
    train(*TEXT, *adaptive, "schedule.tolerance=0.99")
    ks = [r["k"] for r in steps_of(only_run(runs))]
    row = row_of(only_run(runs))
    assert row["block_passes"] == sum(k or (k is None) for k in ks) + 1 + (0 + 1 + 3)
    assert row["sequential_passes"] == sum(16 if k is None else k for k in ks) + 16 + (0 + 1 + 3)


def test_diagnostics_are_records_of_the_run_and_leave_no_trace(train, runs, tmp_path):
    ks = ("diagnostics.ks=[0,1,3]", "diagnostics.at=[0,0.5,1]")
    assert train("steps=4", "k=1", "diagnostics=figure6", *ks).code == 0
    train("steps=4", "k=1", f"run_root={tmp_path / 'without'}")
    folder, without = only_run(runs), only_run(tmp_path / "without")
    measured = [r for r in records_of(folder) if "gradient_error" in r]
    assert [r["step"] for r in measured] == [0, 2, 4]
    for record in measured:
        errors = record["gradient_error"]
        assert [e["k"] for e in errors] == [0, 1, 3]
        assert errors[2]["relative_error"] < 1e-2 < errors[0]["relative_error"]  # L = 3
        assert errors[0]["increment"] > 0.1 and "chain.0" in errors[0]["layers"]
    assert folder.name == without.name
    assert numbers(row_of(folder)) == numbers(row_of(without))
    others = [numbers(r) for r in records_of(folder) if "gradient_error" not in r]
    assert others == [numbers(r) for r in records_of(without)]


def test_a_converted_transformer_follows_a_schedule_too(train, runs):
    adaptive = "schedule=adaptive schedule.budget=0.9 schedule.ks=[0,1,6] schedule.exact_from=0.8"
    assert train(*TINY_GPT, "gamma=auto", *adaptive.split()).code == 0
    ks = [r["k"] for r in steps_of(only_run(runs))]
    assert ks[-1] is None and set(ks[:4]) <= {0, 1, 6, None} and len(ks) == 6


def test_advice_comes_first_and_changes_nothing(train, runs, tmp_path):
    said = train("steps=2", "k=1", "advise=true").out
    assert "cosine" in said and said.index("On this device:") < said.index("accuracy")
    train("steps=2", "k=1", f"run_root={tmp_path / 'without'}")
    assert_same(only_run(runs), only_run(tmp_path / "without"))


def test_backprop_is_measured_by_the_plain_split(train, runs):
    train("steps=2", "grad=bp", "diagnostics=figure6", "diagnostics.at=[1]", "diagnostics.ks=[0]")
    (record,) = [r for r in records_of(only_run(runs)) if "gradient_error" in r]
    assert 0 < record["gradient_error"][0]["cosine"] < 1
