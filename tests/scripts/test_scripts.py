"""The programs that turn run folders into rows, figures and tables, on synthetic runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from experiments.config import config_hash
from experiments.errors import UserError
from experiments.row import CURVE, FIELDS, SCHEMA, SCORES
from scripts import (
    collect_rows,
    compare_signals,
    make_tables,
    plot_gradient_errors,
    plot_results,
    plot_runs,
    plot_schedules,
    upgrade_rows,
)
from scripts.every_source import every_setup
from scripts.paper import paper_rows
from scripts.rows import curve, method_name, read_rows, setups, thin

ROOT = Path(__file__).parents[2]
METHODS = [("bp", None), ("fixed_point", 2), ("highway", 0), ("highway", 1), ("highway", 3)]


def row(grad: str, k: int | None, seed: int = 0, **changes: object) -> dict:
    gap = 0.0 if grad == "bp" else 0.1 / (1 + k) + (0.2 if grad == "fixed_point" else 0.0)
    seconds = 10.0 if k is None else 6.0 + k
    return {
        "schema": SCHEMA, "experiment": None, "model": "resnet20", "parameters": 270_000, "L": 9,
        "grad": grad, "k": k, "schedule": None, "tolerance": None, "gamma": 0.0, "group_size": 1,
        "window": None, "data": "digits", "validation": None, "steps": 300, "epochs": 10.0,
        "batch_size": 64, "lr": 0.1, "seed": seed, "config_hash": f"{grad}{k}", "setup": "one",
        "metric": "eval_accuracy", "block_passes": None, "sequential_passes": None,
        "commit": "abc123", "dirty": False, "device": "CPU, 2 threads",
        "torch": "2.13.0", "python": "3.11", "versions": {}, "reduced": True,
        "eval_accuracy": 0.97 - gap + 0.004 * seed, "eval_loss": 0.1, "train_loss": 0.05 + gap,
        "seconds": seconds, "cpu_seconds": 0.75 * seconds, "seconds_per_step": seconds / 300,
        "peak_memory_mb": 400.0, **changes,
    }


def records(row: dict) -> list[dict]:
    lines = []
    for step in range(1, row["steps"] + 1):
        seconds = row["seconds_per_step"] * step
        loss = row["train_loss"] + 2.3 * math.exp(-step / 60)
        lines.append({"step": step, "seconds": seconds, "train_loss": loss, "lr": 0.1,
                      "k": row["k"], "grad_norm": 1.0, "peak_memory_mb": 400.0})
        if step % 100 == 0:
            lines.append({"step": step, "seconds": seconds, "eval_loss": loss,
                          "eval_accuracy": row["eval_accuracy"]})
    return lines


def write_rows(file: Path, rows: list[dict], more: list[dict] | None = None) -> None:
    """A results file of these rows; ``more`` records belong to every run."""
    file.write_text("".join(
        json.dumps({**r, "curve": curve(r, records(r) + (more or []))}) + "\n" for r in rows))


def write_run(root: Path, row: dict) -> Path:
    folder = root / f"{row['config_hash']}-{row['seed']}"
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps(row))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(row)))
    (folder / "DONE").touch()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for grad, k in METHODS:
        for seed in (0, 1):
            write_run(root, row(grad, k, seed))
    return root


@pytest.fixture
def results(tmp_path: Path, runs: Path) -> Path:
    collect_rows.main([str(runs), str(tmp_path / "results" / "tiny.jsonl")])
    return tmp_path / "results"


def assert_picture(path: Path) -> None:
    pixels = plt.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels.std() > 0.01  # something is drawn


def texts(figure) -> list[str]:
    return [figure.get_suptitle()] + [
        text.get_text() for axes in figure.axes if axes.get_legend()
        for text in axes.get_legend().get_texts()
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that plot_results saves, kept for a look at their texts."""
    figures = []
    monkeypatch.setattr(plot_results, "save", lambda figure, path: (
        path.parent.mkdir(parents=True, exist_ok=True), figures.append(figure)))
    return figures


def test_plot_runs_writes_picture_and_table(runs: Path, capsys: pytest.CaptureFixture) -> None:
    picture = runs / "demo.png"
    plot_runs.main([str(runs), "--out", str(picture)])
    assert_picture(picture)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "BP", "FP k=2", "Highway k=0", "Highway k=1", "Highway k=3"]
    assert lines[3].split()[2:] == ["2", "87.20", "6.0", "0.60"]
    assert lines[-1] == f"picture: {picture}"


def test_table_without_bp_has_no_ratio() -> None:
    assert plot_runs.table([row("highway", 1)]).splitlines()[1].split()[-1] == "-"


def test_unfinished_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path, row("bp", None))
    (write_run(tmp_path, row("highway", 1)) / "DONE").unlink()
    plot_runs.main([str(tmp_path)])
    assert "Highway" not in capsys.readouterr().out
    assert_picture(tmp_path / "comparison.png")


def test_no_finished_runs_is_one_line(tmp_path: Path) -> None:
    program = ROOT / "scripts" / "plot_runs.py"
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: no finished runs under {tmp_path}; expected run folders that contain DONE"]


def test_runs_that_cannot_be_compared_are_refused(runs: Path) -> None:
    write_run(runs, row("highway", 5, steps=100))
    with pytest.raises(UserError, match=r"mixes .* 100 steps of batch 64 and .* 300 steps"):
        plot_runs.main([str(runs)])


def test_a_broken_metrics_line_is_named(runs: Path) -> None:
    with (runs / "bpNone-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    with pytest.raises(UserError, match=r"metrics.jsonl line 304 is not JSON"):
        plot_runs.main([str(runs)])


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
    runs: Path, results: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (results / "tiny.jsonl").read_text()
    collect_rows.main([str(runs), str(results / "tiny.jsonl")])
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


def test_setups_are_kept_apart_the_fullest_first(runs: Path, results: Path) -> None:
    for seed in (0, 1):
        write_run(runs, row("bp", None, seed, setup="whole", steps=400, reduced=False,
                            config_hash="whole"))  # fmt: skip
    collect_rows.main([str(runs), str(results / "tiny.jsonl")])
    assert [(name, len(rows)) for name, rows in every_setup(results)] == [
        ("tiny", 2), ("tiny.2", 10)]
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
        capsys.readouterr().err)
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


def test_an_unwritable_output_is_one_line(results: Path) -> None:
    (results / "tables").write_text("a file where a folder should be")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "make_tables.py", results],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write {results / 'tables'}")


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
    found = {name.split(".")[0] for name, _ in every_setup(ROOT / "results")}
    assert found <= known and len(found) > 5


def test_the_schema_is_documented() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    for name, field in (FIELDS | SCORES | CURVE).items():
        assert f"| `{name}` | {field.meaning} |" in text


def test_plot_results_writes_picture_and_rows(results: Path) -> None:
    plot_results.main([str(results)])
    assert_picture(results / "figures" / "tiny.png")
    used = (results / "figures" / "tiny.rows.txt").read_text().splitlines()
    assert len(used) == 11
    assert used[1] == "bpNone seed 0: BP, commit abc123 (clean), CPU, 2 threads, torch 2.13.0"


def test_same_rows_give_the_same_bytes(results: Path) -> None:
    plot_results.main([str(results)])
    first = (results / "figures" / "tiny.png").read_bytes()
    plot_results.main([str(results)])
    assert (results / "figures" / "tiny.png").read_bytes() == first


@pytest.mark.parametrize("reduced", [True, False])
def test_published_values_only_beside_complete_runs(
    tmp_path: Path, drawn: list, reduced: bool
) -> None:
    rows = [row(g, k, experiment="resnet32_cifar10", reduced=reduced) for g, k in METHODS]
    write_rows(tmp_path / "resnet32.jsonl", rows)
    plot_results.main([str(tmp_path)])
    shown = texts(drawn[0])
    assert ("reduced run: 300 steps" in shown[0]) == reduced
    assert ("published BP 92.75" in shown) == (not reduced)
    assert {"FP", "Highway", "BP 97.00"} <= set(shown)


def test_no_results_is_an_error(tmp_path: Path) -> None:
    for program in (plot_results, make_tables):
        with pytest.raises(UserError, match=r"no \*.jsonl"):
            program.main([str(tmp_path)])


def test_tables(results: Path) -> None:
    make_tables.main([str(results)])
    text = (results / "tables" / "tiny.md").read_text()
    title = "resnet20 (0.27M parameters) on digits, reduced run: 300 steps of batch 64"
    assert text.startswith(f"# {title}\n")
    assert "| Highway k=0 | 2 | 87.20 ± 0.28 | 20.0 | 0.60 | 15.0 | 400 | - | - |" in text
    assert "bpNone seed 1" in text


def test_figure_6_is_drawn_from_the_moments_of_the_runs_that_measured(tmp_path: Path) -> None:
    measured = [
        {"step": step, "seconds": 0.0, "gradient_error": [
            {"k": k, "cosine": 1 - 0.4 ** (k + 1), "relative_error": 0.5 ** k,
             "increment": 0.5 ** k, "layers": {"chain.0": [0.9, 0.1]}} for k in (0, 1, 3)]}
        for step in (0, 150, 300)
    ]  # fmt: skip
    rows = [row("bp", None, seed) for seed in (0, 1)]
    write_rows(tmp_path / "tiny.jsonl", rows, measured)
    write_rows(tmp_path / "other.jsonl", rows)
    table = plot_gradient_errors.moments(
        [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()])
    assert table.loc[(0.5, 1), "cosine"] == pytest.approx(0.84)
    assert list(table.index.unique("fraction")) == [0, 0.5, 1]
    plot_gradient_errors.main([str(tmp_path)])
    assert_picture(tmp_path / "figures" / "tiny.gradient.png")
    assert "bpNone seed 1" in (tmp_path / "figures" / "tiny.gradient.rows.txt").read_text()
    assert not (tmp_path / "figures" / "other.gradient.png").exists()


def test_signals_are_held_against_final_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moment = {"step": 0, "seconds": 0.0, "gradient_error": [
        {"k": k, "cosine": 1 - 0.1 ** k, "relative_error": 0.5 ** k, "increment": 0.3 ** k,
         "layers": {}} for k in (0, 1, 3)]}  # fmt: skip
    rows = [row("bp", None, eval_loss=0.5)]
    rows += [row("highway", k, seed, eval_loss=0.5 + 0.1 / (1 + k)) for k in (0, 1, 3)
             for seed in (0, 1)]  # fmt: skip
    write_rows(tmp_path / "tiny.jsonl", rows, [moment])
    write_rows(tmp_path / "unmeasured.jsonl", rows)
    compare_signals.main([str(tmp_path)])
    text = (tmp_path / "tables" / "signals.md").read_text()
    assert "| resnet20 | 1 | 0.5000 | 0.1000 | 0.0270 | 0.1000 |" in text
    assert text.count("| resnet20 |") == 3 and "- relative error: 1.00" in text
    (tmp_path / "tiny.jsonl").unlink()
    compare_signals.main([str(tmp_path)])
    assert "no run in" in capsys.readouterr().out


def test_schedules_are_compared_by_their_passes(tmp_path: Path, results: Path) -> None:
    counted = {"block_passes": 600, "sequential_passes": 900}
    rows = [row("bp", None, **counted), row("highway", 1, **counted), row("highway", 3, **counted),
            row("highway", 0, schedule="linear start=0 end=5 exact_from=0.9", **counted) | {
                "k": None}]  # fmt: skip
    write_rows(tmp_path / "tiny.jsonl", rows)
    plot_schedules.main([str(tmp_path)])
    assert_picture(tmp_path / "figures" / "tiny.schedules.png")
    assert plot_schedules.passes_per_step(rows[0]) == 3.0
    assert plot_schedules.draw([rows[0], rows[1]], "one", results) is None
    assert plot_schedules.draw([rows[0], rows[3]], "no_fixed_k", results) is None
    make_tables.main([str(tmp_path)])
    text = (tmp_path / "tables" / "tiny.md").read_text()
    assert "| Highway linear start=0 end=5 exact_from=0.9 | 1 |" in text
    assert "| 2.00 | 3.00 |" in text


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
