"""make status and make sweep: what of the paper is there, what is not, and what to type."""

import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.locks import try_lock
from experiments.run_folder import LOCK
from scripts import status, sweep
from scripts.evidence.paper import paper_row, paper_rows
from tests.scripts.synthetic_runs import ROOT, of_paper, write_rows


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def folder(root: Path, about: dict, *, done: bool = False, step: int = 7) -> Path:
    """A run folder as train.py leaves it."""
    path = root / f"{about['model']}-{about['grad']}-k{about['k']}-s{about['seed']}"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    by = {"started": "2026-01-01T00:00:00+00:00", "pid": 1, "host": "here"}
    (path / "started.json").write_text(json.dumps(about | by))
    (path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n{{"step": 9')
    if done:
        (path / "row.json").write_text(json.dumps(about))
        (path / "DONE").touch()
    return path


def shown(tmp_path: Path, capsys, *arguments: str) -> list[str]:
    status.main(
        ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), *arguments]
    )
    return capsys.readouterr().out.splitlines()


def counts(lines: list[str], key: str) -> dict[str, int]:
    (header,) = [line for line in lines if line.split()[:1] == ["planned"]]
    names = [name.strip("()") for name in header.replace("to collect", "collect").split()]
    (cells,) = [line.split()[1:] for line in lines if line.startswith(key + " ")]
    return {n: int(cell) for n, cell in zip(names, cells, strict=True) if cell != "-"}


def test_a_complete_reproduction_has_every_method_k_and_seed():
    for row in paper_rows().values():
        plan = status.plan_of(row)
        ks = sum(len(ks) for name, ks in row.sweep.items() if name != "seeds")
        assert len(set(plan)) == len(plan) == (1 + ks) * len(row.sweep["seeds"])
        assert plan[0] == ("bp", None, 0)


def test_without_results_all_is_missing(tmp_path, capsys, results):
    lines = shown(tmp_path, capsys)
    assert counts(lines, "resnet32") == {"planned": 21, "missing": 21}
    assert counts(lines, "all") == {"planned": 123, "missing": 123}
    assert lines[-1] == f"next: make sweep ROW=resnet32 RUNS={tmp_path / 'runs'}"


def test_every_state_is_told_apart(tmp_path, capsys, results):
    runs, key = tmp_path / "runs", "resnet32"
    write_rows(
        results / f"{key}.jsonl",
        [
            of_paper(key, "bp"),
            of_paper(key, "highway", 1),
            of_paper(key, "highway", 9),
            of_paper(key, "highway", 2, reduced=True, config_hash="short"),
            of_paper(key, "highway", 3, schedule="linear", config_hash="another"),
        ],
    )
    folder(runs, of_paper(key, "bp"), done=True)  # collected: there already
    folder(runs / key, of_paper(key, "highway", 2), done=True)
    folder(runs / key, of_paper(key, "highway", 3))
    at_work = folder(runs / key, of_paper(key, "highway", 4))
    folder(runs, of_paper("gpt2", "bp", experiment="gpt2_wikipedia2015"))
    folder(runs, of_paper("gpt2", "highway", 1, experiment="topics"))  # not the paper's
    (runs / "old").mkdir()
    (runs / "old" / "config.json").write_text("{}")
    with try_lock(at_work / LOCK):
        lines = shown(tmp_path, capsys, "-v")
    assert counts(lines, key) == {
        "planned": 21,
        "done": 2,
        "collect": 1,
        "running": 1,
        "interrupted": 1,
        "missing": 16,
        "reduced": 1,
        "other": 2,
    }
    assert counts(lines, "gpt2") == {"planned": 7, "missing": 7, "stand-in": 1}
    assert f"  highway k=3 seed 0: interrupted, step 7 of 300, {runs / key}" in "\n".join(lines)
    assert "  highway k=4 seed 0: running since 2026-01-01T00:00:00+00:00 on here, step 7" in (
        "\n".join(lines)
    )
    assert "  other: Highway linear seed 0: done" in lines
    assert lines[-2].startswith(f"not counted: 1 folders in {runs} that do not say what they are")
    assert lines[-1] == (f"next: python scripts/collect_rows.py {runs / key} {results / key}.jsonl")


def test_runs_among_those_of_another_row_are_collected_one_by_one(tmp_path, capsys, results):
    runs = tmp_path / "runs"
    mine = folder(runs, of_paper("gru_chars", "bp"), done=True)
    folder(runs, of_paper("gpt2", "bp"), done=True)
    lines = shown(tmp_path, capsys)
    assert f"collect_rows.py {runs}/gpt2-bp-kNone-s0 {results}/gpt2.jsonl" in lines[-1]
    for file in (runs / "gpt2-bp-kNone-s0").iterdir():
        file.unlink()
    assert f"collect_rows.py {mine.parent} {results}/gru_chars.jsonl" in shown(tmp_path, capsys)[-1]


def test_what_cannot_be_collected_is_not_proposed(tmp_path, capsys, results):
    folder(tmp_path / "runs", of_paper("resnet32", "bp", dirty=True), done=True)
    lines = shown(tmp_path, capsys)
    assert counts(lines, "resnet32")["collect"] == 1 and "make sweep" in lines[-1]


def test_what_is_interrupted_comes_before_what_is_missing(tmp_path, capsys, results):
    runs = tmp_path / "runs"
    folder(runs / "gpt2", of_paper("gpt2", "bp"))
    at_work = folder(runs / "roberta", of_paper("roberta", "bp"))
    assert "make sweep ROW=gpt2 " in shown(tmp_path, capsys)[-1]
    with try_lock(at_work / LOCK):
        for file in (runs / "gpt2" / "gpt2-bp-kNone-s0").iterdir():
            file.unlink()
        assert "make sweep ROW=resnet32 " in shown(tmp_path, capsys)[-1]


def test_when_all_is_done_or_being_trained(tmp_path, capsys, results):
    for key, row in paper_rows().items():
        write_rows(
            results / f"{key}.jsonl",
            [of_paper(key, *run, config_hash=f"{run}") for run in status.plan_of(row)],
        )
    assert shown(tmp_path, capsys)[-1] == "next: make figures tables"
    write_rows(results / "gpt2.jsonl", [of_paper("gpt2", "bp")])
    at_work = folder(tmp_path / "runs", of_paper("gpt2", "highway", 1))
    with try_lock(at_work / LOCK):
        assert shown(tmp_path, capsys)[-1].startswith("next: make status, later: ")


@pytest.mark.parametrize("content", ['{"a": 1}\n', "{\n", ""])
def test_a_broken_results_file_is_told_and_the_others_count(tmp_path, capsys, results, content):
    (results / "gpt2.jsonl").write_text(content)
    write_rows(results / "resnet32.jsonl", [of_paper("resnet32", "bp")])
    with pytest.raises(UserError, match=r"left out gpt2\.jsonl; all others are counted"):
        shown(tmp_path, capsys)
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {results / 'gpt2.jsonl'}") and told.err.count("\n") == 1
    assert counts(told.out.splitlines(), "resnet32")["done"] == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"experiment": "gpt2_wikitext103"}'])
def test_a_damaged_folder_is_not_counted(tmp_path, capsys, results, content):
    path = folder(tmp_path / "runs", of_paper("gpt2", "bp"))
    (path / "started.json").write_text(content)
    lines = shown(tmp_path, capsys)
    assert lines[-2].startswith("not counted: 1 folders")
    assert counts(lines, "gpt2") == {"planned": 7, "missing": 7}


def test_it_is_quick_with_hundreds_of_folders(tmp_path, results):
    any_ = of_paper("gru_chars", "bp")
    for root in range(20):
        for grad, k, seed in status.plan_of(paper_row("gru_chars")):
            about = {**any_, "grad": grad, "k": k, "seed": seed, "config_hash": f"{root}{grad}{k}"}
            path = folder(tmp_path / "runs" / str(root), about, done=root % 2 == 0)
            (path / "wandb" / "offline-run-1" / "files").mkdir(parents=True)
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "scripts" / "status.py"),
        "--results",
        str(ROOT / "results"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert seen.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in seen.stderr.splitlines()}
    assert not imported & {"torch", "hydra", "pandas", "numpy"}
    assert min(seconds) < 2


@pytest.fixture
def executed(monkeypatch) -> list[list[str]]:
    """What the process would become."""
    found: list[list[str]] = []
    monkeypatch.setattr(sweep.os, "execv", lambda program, argv: found.append(argv))
    return found


def test_a_row_is_one_sweep(tmp_path, capsys, executed):
    sweep.main(["lstm_chars", "steps=390", "device=cpu", "--jobs", "3", "--runs", str(tmp_path)])
    (command,) = executed
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    assert command[2:] == [
        "-m",
        "experiment=lstm_wikitext103_chars",
        "grad=bp,highway,fixed_point",
        "k=0,1,2,3,5,10,20",
        "seed=0",
        f"run_root={tmp_path / 'lstm_chars'}",
        "hydra/launcher=local",
        "hydra.launcher.n_jobs=3",
        "steps=390",
        "device=cpu",
    ]
    assert shlex.split(capsys.readouterr().out) == ["python", "train.py", *command[2:]]


def test_a_stand_in_takes_the_place_of_the_preset(executed):
    sweep.main(["resnet56", "--stand-in", "resnet56_tiny_imagenet32"])
    assert executed[0][3:5] == ["experiment=resnet56_tiny_imagenet32", "grad=bp,highway"]
    assert not any("launcher" in argument for argument in executed[0])


@pytest.mark.parametrize("key", list(paper_rows()))
def test_the_sweep_of_a_row_is_its_plan(executed, key):
    sweep.main([key])
    swept = dict(argument.split("=") for argument in executed[0][4:7])
    grads, ks, seeds = (swept[name].split(",") for name in ("grad", "k", "seed"))
    asked = {
        (grad, None if grad == "bp" else int(k), int(seed))
        for grad, k, seed in itertools.product(grads, ks, seeds)
    }
    assert asked == set(status.plan_of(paper_row(key)))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["resnet23"], "row 'resnet23' is not one of the paper's; expected resnet32, resnet110"),
        (["", "steps=1"], "row '' is not one of the paper's"),
        (["resnet32", "--jobs", "many"], "--jobs many; expected a whole number, at least 1"),
        (["resnet32", "--jobs", "0"], "--jobs 0; expected a whole number, at least 1"),
        (["resnet56", "--stand-in", "digits"], "expected resnet56_tiny_imagenet32"),
        (["resnet32", "--stand-in", "digits"], "expected none, the row has no stand-in"),
    ],
)
def test_a_wrong_argument_is_told(executed, arguments, line):
    with pytest.raises(UserError) as told:
        sweep.main(arguments)
    assert line in str(told.value) and not executed
