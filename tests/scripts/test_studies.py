"""Studies of finished runs, on tiny ones; and the performance model of several devices."""

import json

import pytest

from experiments.errors import UserError
from scripts.figures.scaling import Costs, predicted_costs, seconds
from scripts.studies import compare_runs, gradient_errors
from tests.train_cli import TINY_GPT, only_run, records_of

pytestmark = pytest.mark.slow


def test_gammas_and_groups_of_a_transformer_at_every_moment(train, runs, tmp_path):
    assert train(*TINY_GPT, "grad=bp", "trainer.snapshots=[2,4]").code == 0
    folder, out = only_run(runs), tmp_path / "errors.json"
    gradient_errors.main([str(folder), "--batches", "1", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [m["step"] for m in record["moments"]] == [2, 4, 6]
    for moment in record["moments"]:
        by_case = {(e["variant"], e["k"]): e for e in moment["errors"]}
        assert len(by_case) == (5 + 1) * 5
        assert by_case["4 groups", 3]["relative_error"] < 1e-4  # three groups of six: exact
        assert by_case["gamma 0.5", 0]["relative_error"] > 1e-4


def test_carries_and_windows_of_a_recurrent_network(train, runs, capsys):
    small = ["model=lstm_char", "data=topics_chars", "data.length=24", "model.hidden=8"]
    assert train("experiment=topics_tiny", *small, "grad=bp").code == 0
    gradient_errors.main([str(only_run(runs))])
    printed = capsys.readouterr().out
    for name in ("gate carry", "literal carry", "diagonal carry", "windows of 16", "fixed point"):
        assert f"\n{name} " in printed
    with pytest.raises(SystemExit):
        gradient_errors.main([str(only_run(runs)), "--batches", "0"])
    assert "argument --batches: 0; expected a whole number" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no finished run"):
        gradient_errors.main([str(runs)])


def test_runs_are_compared_step_by_step(train, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(f"seed={seed}", "grad=bp", f"run_root={tmp_path / name}").code == 0
    a, b, c = (only_run(tmp_path / name) for name in "abc")
    out = tmp_path / "equal.json"
    compare_runs.main([f"one={a}", f"same={b}", f"other={c}", "--out", str(out)])
    same, other = json.loads(out.read_text())["differences"]
    assert same["train_loss"] == {"records": 6, "largest": 0.0, "at_step": 1}
    assert other["grad_norm"]["largest"] > 0
    found = compare_runs.by_step(records_of(a))
    with pytest.raises(UserError, match="no record has grad_norm"):
        compare_runs.differences(*[found.drop(columns="grad_norm")] * 2)
    with pytest.raises(UserError, match="not recorded the same steps"):
        compare_runs.differences(found, found[:2])
    with pytest.raises(UserError, match="expected LABEL=FOLDER"):
        compare_runs.main([str(a)])
    with pytest.raises(UserError, match="label one alone; expected runs with at least two labels"):
        compare_runs.main([f"one={a}", f"one={c}"])


def test_the_performance_model_by_hand():
    """Four layers of 1 + 1 + 1 seconds on two devices, messages of a tenth."""
    found = seconds(Costs(4, 1.0, 1.0, 1.0, message=0.1, weights=0.08), P=2, M=2)
    assert found["model parallel"] == pytest.approx(12 + 2 * 0.1)
    assert found["GPipe, 1F1B"] == pytest.approx(1.5 * 6 + 2 * 0.1 / 2)
    assert found["data parallel"] == pytest.approx(6 + 4 * 0.08)
    assert found["Highway k=0"] == pytest.approx(4 + 2 * 2 + 2 * 0.1)
    assert found["Highway k=1"] == pytest.approx(4 + 2 * 2 + 2 + 3 * 0.1)
    assert found["Highway k=0, micro-batches"] == pytest.approx(1.5 * 2 + 4 + 0.2)


def test_more_devices_are_predicted_to_be_faster():
    costs = predicted_costs()
    for name in ("GPipe, 1F1B", "Highway k=0", "Highway k=1, micro-batches"):
        steps = [seconds(costs, P, 8)[name] for P in (2, 4, 8, 16)]
        assert steps == sorted(steps, reverse=True) and steps[-1] < costs.step
