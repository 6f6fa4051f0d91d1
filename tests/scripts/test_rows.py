"""Rows of finished runs: collected, checked, upgraded, named and grouped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.config import config_hash
from experiments.errors import UserError
from experiments.row import CURVE, FIELDS, SCORES, SOMETIMES
from scripts import collect_rows, make_tables, upgrade_rows
from scripts.evidence.every_source import key_of, read_results
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import method_name, read_rows, setups, thin
from tests.scripts.synthetic_runs import ROOT, row, write_rows, write_run


def test_collect_keeps_rows_and_thinned_curves(results: Path) -> None:
    rows = [json.loads(line) for line in (results / "tiny.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    first = rows[0]
    train = first.pop("curve")["train"]
    assert first == row("bp", None)
    assert len(train["step"]) == 60
    assert (train["step"][0], train["step"][-1]) == (1, 300)
    assert train["seconds"][-1] == pytest.approx(10.0)


def test_collect_twice_adds_nothing(
    run_folders: Path, results: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (results / "tiny.jsonl").read_text()
    collect_rows.main([str(run_folders), str(results / "tiny.jsonl")])
    assert (results / "tiny.jsonl").read_text() == before
    assert capsys.readouterr().out.count("already there") == 10


def test_collect_refuses_dirty_commits_unless_allowed(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", row("bp", None))
    write_run(tmp_path / "runs", row("highway", 1, dirty=True))
    file = tmp_path / "tiny.jsonl"
    with pytest.raises(UserError, match="uncommitted changes: Highway k=1"):
        collect_rows.main([str(tmp_path / "runs"), str(file)])
    assert not file.exists()
    collect_rows.main([str(tmp_path / "runs"), str(file), "--allow-dirty"])
    assert len(file.read_text().splitlines()) == 2


def test_setups_are_kept_apart_the_fullest_first(run_folders: Path, results: Path) -> None:
    for seed in (0, 1):
        write_run(
            run_folders,
            row("bp", None, seed, setup="whole", steps=400, reduced=False, config_hash="whole"),
        )
    collect_rows.main([str(run_folders), str(results / "tiny.jsonl")])
    found = read_results(results).setups
    assert {name: len(rows) for name, rows in found.items()} == {"tiny": 2, "tiny.2": 10}
    make_tables.main([str(results)])
    text = (results / "tables" / "tiny.md").read_text()
    assert text.startswith("# resnet20 (0.27M parameters) on digits, 400 steps of batch 64\n")
    assert "whole seed 1" in text and "bpNone" not in text


def test_another_learning_rate_is_another_setup() -> None:
    assert len(setups([row("bp", None), row("bp", None, lr=0.2)])) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": None}, "seed is None, expected int"),
        ({"k": 1.5}, "k is 1.5, expected int or null"),
        ({"reduced": 1}, "reduced is 1, expected bool"),
        ({"colour": "red"}, "colour is unknown"),
        ({"schema": 1}, "is of schema 1, expected 2; scripts/upgrade_rows.py"),
        ({"metric": "eval_perplexity"}, "metric is 'eval_perplexity', expected the name of"),
        ({"grad": "magic"}, "grad is 'magic', expected one of bp, "),
        ({"gamma": "big"}, "gamma is 'big', expected a number, auto or null"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_told_and_the_others_go_on(
    results: Path, capsys: pytest.CaptureFixture, change: dict, told: str
) -> None:
    good, other = (results / "tiny.jsonl").read_text().splitlines()[:2]
    bad = json.dumps(json.loads(other) | change)
    (results / "bad.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(UserError, match=r"left out bad.jsonl; all others are done"):
        make_tables.main([str(results)])
    assert f"bad.jsonl line 2{' ' if 'schema' in change else ': '}{told}" in (
        capsys.readouterr().err
    )
    assert (results / "tables" / "tiny.md").exists()
    assert not (results / "tables" / "bad.md").exists()


def test_missing_fields_and_two_rows_of_one_run_are_told(tmp_path: Path) -> None:
    short = row("bp", None)
    del short["device"], short["lr"]
    (tmp_path / "short.jsonl").write_text(json.dumps(short))
    with pytest.raises(UserError, match="line 1: lr is missing; device is missing"):
        read_rows(tmp_path / "short.jsonl")
    write_rows(tmp_path / "twice.jsonl", [row("bp", None, s) for s in (0, 1, 0)])
    with pytest.raises(UserError, match=r"lines 1 and 3 are of one run \(bpNone, seed 0\)"):
        read_rows(tmp_path / "twice.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty.jsonl is empty"):
        read_rows(tmp_path / "empty.jsonl")


def test_rows_of_schema_1_are_brought_up_to_date(tmp_path: Path) -> None:
    write_rows(tmp_path / "old.jsonl", [row("highway", 3)])
    old = json.loads((tmp_path / "old.jsonl").read_text())
    for later in ("schema", "setup", "metric", "parameters", "schedule", "cpu_seconds"):
        del old[later]
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n")
    folder = tmp_path / "runs" / "resnet20-highway-k3-highway3-s0"
    folder.mkdir(parents=True)
    config = {"model": {"depth": 20}, "grad": {"k": 3}, "schedule": {}, "seed": 0}
    (folder / "config.json").write_text(json.dumps(config))
    upgrade_rows.main([str(tmp_path / "old.jsonl"), "--runs", str(tmp_path / "runs")])
    (new,) = read_rows(tmp_path / "old.jsonl")
    assert (new["schema"], new["metric"], new["cpu_seconds"]) == (2, "eval_accuracy", None)
    assert new["setup"] == config_hash({"model": {"depth": 20}})
    assert new["curve"]["train"]["step"][-1] == 300
    before = (tmp_path / "old.jsonl").read_text()
    upgrade_rows.main([str(tmp_path / "old.jsonl")])
    assert (tmp_path / "old.jsonl").read_text() == before


def test_the_committed_rows_are_of_the_schema_and_one_run_each() -> None:
    known = set(paper_rows()) | {"resnet20"}  # beyond the paper: schedules
    results = read_results(ROOT / "results")
    assert not results.left_out
    found = set(map(key_of, results.setups))
    assert found <= known and len(found) > 5


def test_the_schema_is_documented() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    for name, field in (FIELDS | SCORES | SOMETIMES | CURVE).items():
        assert f"| `{name}` | {field.meaning} |" in text


def test_method_names_tell_variants_apart() -> None:
    assert method_name(row("bp", None)) == "BP"
    variant = row("highway", 3, gamma=0.2, group_size=4)
    assert method_name(variant) == "Highway, gamma=0.2, groups of 4 k=3"


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 500])
def test_thin_keeps_both_ends(count: int) -> None:
    steps = [{"step": step} for step in range(count)]
    kept = thin(steps)
    assert len(kept) == min(count, 60)
    assert kept[:1] == steps[:1] and kept[-1:] == steps[-1:]
    assert len({r["step"] for r in kept}) == len(kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda curve: curve.pop("eval"),
        lambda curve: curve["train"].pop("seconds"),
        lambda curve: curve["train"]["step"].pop(),
        lambda curve: curve.update(train=[]),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_told(tmp_path: Path, change) -> None:
    write_rows(tmp_path / "bad.jsonl", [row("bp", None)])
    bad = json.loads((tmp_path / "bad.jsonl").read_text())
    change(bad["curve"])
    (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"line 1: curve, (train|eval): expected the columns step"):
        read_rows(tmp_path / "bad.jsonl")


def test_of_two_setups_of_one_length_that_of_more_rows_comes_first() -> None:
    older = [row("bp", None, setup=None)]
    newer = [row("bp", None), row("highway", 3)]
    assert setups(older + newer) == [newer, older]
