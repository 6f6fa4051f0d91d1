"""The comparison of gammas, from snapshots that training keeps."""

import json

import pytest

from experiments.errors import UserError
from scripts import advise_runs, compare_gammas
from tests.train_cli import only_run, row_of

TINY_GPT = (
    "experiment=topics_tiny",
    "model=gpt2_small",
    "data=topics_words",
    "data.length=16",
    "data.vocabulary=300",
    "model.layers=3",
    "model.hidden=8",
    "optim.batch_size=4",
)


def test_gammas_are_compared_at_every_moment(train, runs, tmp_path):
    assert train(*TINY_GPT, "grad=bp", "trainer.snapshots=[2,4]").code == 0
    folder, out = only_run(runs), tmp_path / "gammas.json"
    files = sorted((folder / "snapshots").glob("*.pt"))
    assert [f.name for f in files] == ["2.pt", "4.pt"]
    compare_gammas.main(
        [str(folder), "--snapshots", *map(str, files), "--out", str(out), "--batches", "1"]
    )
    record = json.loads(out.read_text())
    assert [m["step"] for m in record["moments"]] == [2, 4, 6]
    assert record["trained"]["model"] == "gpt2_small"
    for moment in record["moments"]:
        assert len(moment["errors"]) == 2 * 5 * 5
        for row in moment["errors"]:
            if row["k"] == 5 and row["group_size"] == 2:  # three groups: exact
                assert row["relative_error"] < 1e-4, row
            if row["k"] == 0 and row["gamma"] == 0.5:
                assert row["relative_error"] > 1e-4, row
    page = out.with_suffix(".md").read_text()
    assert "| gamma auto, 3 groups |" in page and "## After 2 steps, training loss" in page
    with pytest.raises(UserError, match="no snapshot of this model"):
        compare_gammas.main([str(folder), "--snapshots", str(folder / "row.json")])
    advise_runs.main([str(folder), "--out", str(tmp_path / "advice.md")])
    page = (tmp_path / "advice.md").read_text()
    assert "## gpt2_small after 6 steps of bp, batch 4, topics" in page
    assert "On this device: " in page and "commit" in page


def test_estimates_of_gamma_survive_an_interruption(train, runs, tmp_path):
    from tests.test_errors import stop_after

    ask = (*TINY_GPT, "grad=highway", "k=1", "gamma=auto", "trainer.eval_interval=6")
    assert train(*ask).code == 0
    whole = row_of(only_run(runs))
    again = tmp_path / "again"
    stop_after(lambda *more: train(*ask, f"run_root={again}", *more), 3)
    assert train(*ask, f"run_root={again}").code == 0
    resumed = row_of(only_run(again))
    assert resumed["gamma"] == "auto"
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["eval_loss"] == whole["eval_loss"]
    assert (only_run(again) / "pretrained" / "model.safetensors").exists()
