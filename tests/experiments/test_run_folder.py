"""A run's folder: what survives a crash, and what a wrong folder says."""

import json
from pathlib import Path

import pytest

from experiments import run_folder
from experiments.errors import UserError
from experiments.run_folder import RunFolder

CONFIG = {"model": {"depth": 20}, "lr": 0.1, "seed": 0}


def created(path: Path, config: dict = CONFIG) -> RunFolder:
    folder = RunFolder(path)
    folder.create(config)
    return folder


def with_steps(path: Path, *steps: int) -> RunFolder:
    folder = created(path)
    for step in steps:
        folder.append({"step": step, "loss": 1 / step})
    return folder


def test_records_come_back_as_they_were_written(tmp_path):
    with_steps(tmp_path / "run", 1, 3)  # on disk when append returns
    expected = [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 1 / 3}]
    assert RunFolder(tmp_path / "run").records() == expected


def test_a_new_folder_has_the_config_and_no_records_and_is_not_there_before(tmp_path):
    RunFolder(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
    folder = created(tmp_path / "deep" / "run")
    assert json.loads((folder.path / "config.json").read_text()) == CONFIG
    assert folder.records() == []
    assert not folder.finished


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3}', "{"])
def test_a_half_written_last_line_is_left_out(tmp_path, rest):
    folder = with_steps(tmp_path / "run", 1, 2)
    with open(folder.path / "metrics.jsonl", "a") as f:
        f.write(rest)
    assert [r["step"] for r in folder.records()] == [1, 2]
    folder.keep_until(9)
    folder.append({"step": 3, "loss": 0.0})
    assert [r["step"] for r in folder.records()] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "[1]", "{}", '{"step": "a"}', '{"step": 1.5}'])
def test_a_damaged_line_is_reported(tmp_path, line):
    folder = with_steps(tmp_path / "run", 1)
    file = folder.path / "metrics.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"line 2 is not a JSON object with a whole number 'step'"):
        folder.records()


@pytest.mark.parametrize(("last", "kept"), [(0, 0), (2, 3), (3, 4), (4, 5), (5, 6)])
def test_keep_until_drops_what_comes_after_a_training_step(tmp_path, last, kept):
    folder, records = created(tmp_path / "run"), []
    for step in (1, 2, 4):
        records += [{"step": step, "train_loss": 0.5}, {"step": step, "eval_loss": 0.6}]
    for record in records:
        folder.append(record)
    assert folder.keep_until(last) == folder.records() == records[:kept]


@pytest.mark.parametrize("inside", [".", "run"])
def test_a_file_in_place_of_the_folder_is_told_in_one_line(tmp_path, inside):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="cannot write") as told:
        created(tmp_path / "taken" / inside)
    assert str(tmp_path / "taken") in str(told.value)
    assert "\n" not in str(told.value)
    assert (tmp_path / "taken").read_text() == "mine"


def test_metrics_that_cannot_be_written_are_told(tmp_path):
    folder = created(tmp_path / "run")
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        folder.append({"step": 1})


def test_finish_writes_the_row_then_done(tmp_path, monkeypatch):
    folder = with_steps(tmp_path / "run", 1)
    order = []

    def spy(path: Path, text: str) -> None:
        order.append((path.name, folder.finished))
        path.write_text(text)

    monkeypatch.setattr(run_folder, "write_text", spy)
    folder.finish({"eval_accuracy": 0.5})
    assert order == [("row.json", False), ("DONE", False)]
    assert folder.finished
    assert json.loads((folder.path / "row.json").read_text()) == {"eval_accuracy": 0.5}


@pytest.mark.parametrize("text", ['{"eval_acc', "", "[]", None])
def test_done_without_a_readable_row_is_not_finished(tmp_path, text):
    folder = with_steps(tmp_path / "run", 1)
    folder.finish({"eval_accuracy": 0.5})
    (folder.path / "metrics.jsonl").unlink()
    assert folder.finished  # though it has lost its records
    row = folder.path / "row.json"
    row.unlink() if text is None else row.write_text(text)
    assert not folder.finished


def test_no_temporary_files_stay(tmp_path):
    folder = with_steps(tmp_path / "run", 1, 2)
    folder.keep_until(1)
    folder.finish({})
    names = {"DONE", "config.json", "metrics.jsonl", "row.json"}
    assert {p.name for p in folder.path.iterdir()} == names
