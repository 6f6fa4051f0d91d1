"""Rows of finished runs: checked, named, collected; and what is committed of them."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import composed
from experiments.errors import UserError
from experiments.identity import config_hash, identity, setup_hash
from experiments.plan import build
from experiments.row import FIELDS, command
from scripts import bench_steps, collect_rows, plot_runs, run_plan, status
from scripts.evidence.paper import PlannedRun, paper_rows, plan, preset_setup
from scripts.evidence.results import read_results
from scripts.evidence.rows import arm_of, by_arm, read_rows, thin
from scripts.studies import compare_runs
from tests.scripts.synthetic_runs import ROOT, row, write_rows, write_run

pytestmark = pytest.mark.slow

COMMITTED = [
    pytest.param(one, id=f"{file.stem}-{number}")
    for file in sorted((ROOT / "results").glob("*.jsonl"))
    for number, one in enumerate(map(json.loads, file.read_text().splitlines()))
]


@pytest.mark.parametrize("committed", COMMITTED)
def test_a_committed_rows_command_composes_to_its_hash(committed):
    """From the printed text alone, without the stored configuration."""
    python, train, *arguments = shlex.split(command(committed))
    assert (python, train) == ("python", "train.py")
    cfg = composed(*arguments)
    assert (cfg.seed, cfg.device) == (committed["seed"], committed["device_kind"])
    fields = identity(cfg, cfg.device)
    assert config_hash(fields) == committed["config_hash"]
    assert setup_hash(fields) == committed["setup"] or "model.carry" in command(committed)


def test_the_committed_rows_are_of_the_schema_of_presets_and_clean():
    results = read_results(ROOT / "results")
    assert not results.left_out
    rows = [row for settings in results.settings.values() for s in settings for row in s.rows]
    assert len(rows) == len(COMMITTED) > 10
    assert not any(row["dirty"] for row in rows)
    text = json.dumps(rows)
    assert "/work" not in text and "/home" not in text and "run_root" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "is of schema 2, expected 3"),
        ({"k": "3"}, "k is '3', expected int or null"),
        ({"dirty": 0}, "dirty is 0, expected bool"),
        ({"more": 1}, "more is unknown"),
        ({"metric": "eval_magic"}, "metric is 'eval_magic'"),
        ({"diverged": True}, "diverged True"),
        ({"eval_accuracy": None}, "eval_accuracy is None and diverged False"),
        ({"eval_accuracy": math.nan}, "eval_accuracy is nan, expected float or int or null"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_reported(tmp_path, change, message):
    file = write_rows(tmp_path, "gru_pixels", [row("gru_pixels"), row("gru_pixels") | change])
    with pytest.raises(UserError, match="line 2") as error:
        read_rows(file)
    assert message in str(error.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_to_be_there(tmp_path, name):
    short = {key: value for key, value in row("gru_pixels").items() if key != name}
    file = write_rows(tmp_path, "gru_pixels", [short])
    with pytest.raises(UserError, match="is of schema" if name == "schema" else f"{name} is miss"):
        read_rows(file)


def test_two_rows_of_one_run_and_broken_files_are_reported(tmp_path):
    twice = write_rows(tmp_path, "resnet32", [row("resnet32", seed=s) for s in (0, 1, 0)])
    with pytest.raises(UserError, match=r"lines 1 and 3 are of one run \(.*on cpu, seed 0\)"):
        read_rows(twice)
    on_both = [row("resnet32"), row("resnet32", device="cuda")]
    assert len(read_rows(write_rows(tmp_path, "resnet32", on_both))) == 2
    for content in (b"{", b"\xff\n", b"3\n"):
        (tmp_path / "broken.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.jsonl line 1 is not a JSON object"):
            read_rows(tmp_path / "broken.jsonl")


def test_arms_are_named_as_people_call_them():
    assert str(arm_of(row("gru_pixels"))) == "BP"
    variant = row("gru_pixels", "highway", 3, gamma=0.2, group_size=4)
    assert str(arm_of(variant)) == "Highway gamma=0.2 groups of 4 k=3"
    assert str(arm_of(row("gru_pixels", "fixed_point", 3))) == "FP k=3"
    literal = row("lstm_chars", "highway", 1, carry="literal")
    assert str(arm_of(literal)) == "Highway carry=literal k=1"
    mine = row("gru_pixels", "mine.Half", 1)
    assert list(map(str, by_arm([mine, literal]))) == [str(arm_of(literal)), "mine.Half k=1"]


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 500])
def test_thin_keeps_both_ends(count):
    steps = [{"step": step} for step in range(count)]
    kept = thin(steps)
    assert len(kept) == min(count, 60)
    assert kept[:1] == steps[:1] and kept[-1:] == steps[-1:]
    assert len({r["step"] for r in kept}) == len(kept)


@pytest.fixture
def folders(tmp_path) -> Path:
    """Run folders of two experiments."""
    for one in (row("gru_pixels"), row("gru_pixels", "highway", 3), row("resnet32")):
        write_run(tmp_path / "runs", one)
    return tmp_path / "runs"


def test_collecting_sorts_runs_into_their_files(folders, tmp_path, capsys):
    arguments = [str(folders), "--results", str(tmp_path / "results")]
    collect_rows.main(arguments)
    pixels = read_rows(tmp_path / "results" / "gru_pixels.jsonl")
    assert [str(arm_of(r)) for r in pixels] == ["BP", "Highway k=3"]
    assert len(pixels[0]["curve"]["train"]["step"]) == 60
    before = (tmp_path / "results" / "gru_pixels.jsonl").read_text()
    collect_rows.main(arguments)
    assert "0 rows added" in capsys.readouterr().out
    assert (tmp_path / "results" / "gru_pixels.jsonl").read_text() == before


def test_what_no_commit_or_no_preset_describes_is_refused(folders, tmp_path):
    write_run(folders, row("gru_pixels", "highway", 5, dirty=True))
    write_run(folders, row("gru_pixels", "highway", 7, setup="another"))
    with pytest.raises(UserError, match=r"2 refused: .*(uncommitted|gives today)") as error:
        collect_rows.main([str(folders), "--results", str(tmp_path / "results")])
    assert "uncommitted changes" in str(error.value) and "gives today" in str(error.value)
    assert len(read_rows(tmp_path / "results" / "gru_pixels.jsonl")) == 2
    with pytest.raises(UserError, match="has no finished runs; expected folders named resnet32"):
        collect_rows.main([str(tmp_path / "results")])


def test_the_plan_names_presets_of_its_experiments_and_each_run_once():
    assert {one.key for one in plan()} == set(paper_rows())
    for one in plan():
        assert one.overrides[0].removeprefix("experiment=") in paper_rows()[one.key].presets
    results = [one.result for one in plan()]
    assert len(set(results)) == len(results)


def test_every_reduced_setting_is_another_one():
    for paper in paper_rows().values():
        setups = {preset_setup(preset, "cpu") for preset in paper.presets}
        assert len(setups) == len(paper.presets)


def test_a_plan_runs_what_is_missing_and_stops_in_good_order(tmp_path, monkeypatch, capsys):
    tiny = "experiment=topics_tiny"
    planned = [PlannedRun("gru_chars", (tiny, arm), 0) for arm in ("grad=bp", "k=1", "k=x")]
    monkeypatch.setattr(run_plan, "plan", lambda: planned)
    arguments = ["gru_chars", "--runs", str(tmp_path), "--jobs", "2"]
    with pytest.raises(UserError, match="1 runs failed"):
        run_plan.main(arguments)
    assert len(list(tmp_path.glob("gru_chars/*/DONE"))) == 2
    capsys.readouterr()
    run_plan.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines()[0] == "1 runs to make"
    with pytest.raises(SystemExit):
        run_plan.main([*arguments, "--jobs", "0"])


def test_a_plan_leaves_out_runs_whose_rows_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_plan.torch.cuda, "is_available", lambda: False)
    made = row("gru_pixels", seed=1)
    write_rows(tmp_path, "gru_pixels", [{**made, "overrides": [*made["overrides"][:1], "grad=bp"]}])
    arguments = ["gru_pixels", "--runs", str(tmp_path), "--list"]
    found = {}
    for results in (tmp_path, tmp_path / "empty"):
        monkeypatch.setattr(run_plan, "RESULTS", results)
        run_plan.main(arguments)
        found[results] = capsys.readouterr().out.splitlines()
    (missing,) = set(found[tmp_path / "empty"][1:]) - set(found[tmp_path])
    assert "experiment=gru_cifar10_pixels grad=bp" in missing and "seed=1" in missing


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("row.json", b"\xff", "row.json cannot be read; run it again"),
        ("row.json", b'{"schema": 3, "div', "row.json cannot be read; run it again"),
        ("row.json", b"[]", "row.json is not a row; expected a JSON object"),
        ("row.json", b"{}", "row.json is of schema 1, expected 3; make it again"),
        ("metrics.jsonl", b"", "metrics.jsonl has no records of training; run it again"),
    ],
)
def test_a_broken_run_folder_is_one_line(tmp_path, file, content, line):
    folder = write_run(tmp_path, row("gru_pixels"))
    (folder / file).write_bytes(content)
    for script, given in ((plot_runs, [str(tmp_path)]), (compare_runs, [f"a={folder}"] * 2)):
        with pytest.raises(UserError, match=line):
            script.main(given)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gru_cifar10_pixels", "--repeats", "0"], "0; expected a whole number, at least 1"),
        (["gru_cifar10_pixels", "model.hidden=8"], "expected --out FILE as well"),
        (["nowhere"], "error: Could not find 'experiment/nowhere'"),
    ],
)
def test_step_times_of_what_is_no_preset_are_not_measured(arguments, line):
    command = [sys.executable, ROOT / "scripts" / "bench_steps.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and line in done.stderr and "Traceback" not in done.stderr


def test_step_times_of_sentence_pairs_are_of_the_model_and_the_data_that_train(tmp_path):
    preset = "experiment=grammar"
    data = bench_steps.data_of(composed(preset))
    small = build(composed(preset, "model.hidden=24"), "model", **data.model_arguments())
    small.save_pretrained(tmp_path)
    cfg = composed(preset, f"model.pretrained={tmp_path}")
    model, _, _, (x, _), _ = bench_steps.step_of(cfg, data, "bp").args
    assert model.model.config.hidden_size == 24
    assert x.shape[-1] < data.train.shape[-1]  # common padding is cut, as in training


def test_status_counts_rows_and_folders_of_one_device(folders, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setattr(run_plan, "RESULTS", results)
    collect_rows.main([str(folders), "--results", str(results)])
    (folders / "resnet32" / "broken").mkdir()
    (folders / "resnet32" / "broken" / "started.json").write_text("{")
    running = write_run(folders, row("gru_pixels", "highway", 5))
    (running / "DONE").unlink()
    write_run(folders, row("gru_pixels", "highway", 1))
    arguments = ["--runs", str(folders)]
    capsys.readouterr()
    status.main(arguments)
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if "gru_pixels" in line).split()
    planned = sum(one.key == "gru_pixels" for one in plan())
    assert line[1:] == ["2", "1", "-", "1", str(planned - 4), "-"]
    assert "next: python scripts/collect_rows.py" in out and "started.json is damaged" in err
    status.main([*arguments, "--device", "cuda", "-v"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert status.next_command({plan()[0]: "done", plan()[-1]: status.GPU}, folders, "cuda") == (
        f"python scripts/run_plan.py --runs {folders} --gpu"
    )
    assert ["gru_pixels", "-", "-", "-", "-", str(planned), "-"] in lines
    run = ["experiment=gru_cifar10_pixels", "grad=highway", "k=10", "seed=0"]
    assert ["missing", "gru_pixels:", *run] in lines
