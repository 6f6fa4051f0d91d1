"""torchrun train.py parallel=layers: two processes train as one, and go on after one has died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train_cli import ROOT, numbers, only_run, records_of, row_of

TINY = ["experiment=digits_tiny", "logger=none", "trainer.threads=1", "trainer.channels_last=false"]


def torchrun(
    root: Path, *arguments: str, restarts: int = 0, processes: int = 2
) -> subprocess.Popen:
    given = {argument.split("=")[0] for argument in arguments}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
        "train.py",
        *(a for a in TINY if a.split("=")[0] not in given),
        f"run_root={root}",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_backprop_on_two_processes_is_that_of_one(train, runs, tmp_path):
    process = torchrun(tmp_path / "two", "grad=bp", "parallel=layers")
    assert train("grad=bp", *TINY[2:]).code == 0
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("s of training") == 1  # one of them tells
    two, one = only_run(tmp_path / "two"), only_run(runs)
    for a, b in zip(records_of(two), records_of(one), strict=True):
        for key in a.keys() & {"train_loss", "eval_loss", "grad_norm", "lr"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert row_of(two)["L"] == 3 and row_of(two)["config_hash"] != row_of(one)["config_hash"]


def test_a_killed_process_costs_no_more_than_its_steps(tmp_path):
    arguments = ["grad=highway", "k=0", "parallel=layers", "steps=200"]
    whole = torchrun(tmp_path / "whole", *arguments)
    killed = torchrun(tmp_path / "killed", *arguments, restarts=1)
    kill_at_step(tmp_path / "killed", 60)
    for process in (whole, killed):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        lost = "error: lost touch with rank 0, which has died; expected all to be at work"
        assert err.count(lost) == (process is killed)
    a, b = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [numbers(r) for r in records_of(a)] == [numbers(r) for r in records_of(b)]
    assert numbers(row_of(a)) == numbers(row_of(b))


def test_what_is_measured_on_two_processes_is_that_of_one_with_their_groups(train, runs, tmp_path):
    arguments = [
        "grad=highway",
        "schedule=adaptive",
        "schedule.ks=[0,1,5]",
        "schedule.budget=0.9",
        "schedule.tolerance=0.4",
        "steps=12",
        "diagnostics=figure6",
        "diagnostics.at=[0,0.5]",
    ]
    process = torchrun(tmp_path / "two", *arguments, "parallel=layers", "parallel.sizes=[2,1]")
    assert train(*arguments, *TINY[2:], "grad.group_size=2").code == 0
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two, one = only_run(tmp_path / "two"), only_run(runs)
    steps, expected = ([r for r in records_of(run) if "k" in r] for run in (two, one))
    assert {0, 1, None} == {r["k"] for r in expected}
    for a, b in zip(steps, expected, strict=True):
        assert (a["k"], a["iterations"]) == (b["k"], b["iterations"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert_same_errors(two, one)
    for key in ("L", "block_passes", "sequential_passes"):
        assert row_of(two)[key] == row_of(one)[key]


def assert_same_errors(a: Path, b: Path) -> None:
    """Of the gradients that two runs have measured."""
    found, expected = (
        [e for r in records_of(run) for e in r.get("gradient_error", [])] for run in (a, b)
    )
    assert expected
    for e, f in zip(found, expected, strict=True):
        assert e["relative_error"] == pytest.approx(f["relative_error"], rel=1e-3, abs=1e-4)
        assert e["layers"].keys() == f["layers"].keys()


def kill_at_step(root: Path, step: int) -> None:
    """The first process of the run, once it has come to that step."""
    run = wait_for_step(root, step)
    os.kill(json.loads((run / "started.json").read_text())["pid"], signal.SIGKILL)


def wait_for_step(root: Path, step: int) -> Path:
    """The run's folder."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        for file in root.glob("*/metrics.jsonl"):
            if len(file.read_text().splitlines()) >= step:
                return file.parent
        time.sleep(0.02)
    raise AssertionError("the run has not come that far")


def test_a_sweep_is_refused(train):
    outcome = train("-m", "parallel=layers")
    assert outcome.code == 1
    assert "parallel=layers in a sweep; expected one run per torchrun" in outcome.err


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("parallel.data=2", "parallel.data=2 with 3 processes; expected torchrun's number to be"),
        ("parallel.sizes=fast", "parallel.sizes=fast; expected null or a list of"),
        ("parallel.sizes=3", "parallel.sizes=3; expected null or a list of"),
        ("parallel.sizes=[2,x]", "parallel.sizes=[2, 'x']; expected null or a list of"),
    ],
)
def test_what_cannot_be_shared_out(train, monkeypatch, argument, told):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    outcome = train("parallel=layers", argument)
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert told in outcome.err


TEXT = [
    "experiment=topics_tiny",
    "model=gpt2",
    "model.layers=4",
    "model.hidden=16",
    "model.heads=2",
    "optim.batch_size=8",
    "steps=12",
]


def test_replicas_on_real_text_train_as_one_process_with_the_groups(train, runs, tmp_path):
    """Two replicas, each on two processes, in micro-batches."""
    arguments = [
        *TEXT,
        "grad=highway",
        "k=0",
        "diagnostics=figure6",
        "diagnostics.at=[0.5]",
        "diagnostics.ks=[0,1]",
    ]
    four = torchrun(
        tmp_path / "four",
        *arguments,
        "parallel=layers",
        "parallel.data=2",
        "parallel.micro_batches=2",
        processes=4,
    )
    assert train(*arguments, "grad.group_size=4", *TINY[2:]).code == 0
    _, err = four.communicate(timeout=300)
    assert four.returncode == 0, err
    for a, b in zip(
        *(records_of(only_run(root)) for root in (tmp_path / "four", runs)), strict=True
    ):
        for key in a.keys() & {"train_loss", "eval_loss"}:
            assert a[key] == pytest.approx(b[key], abs=1e-6)
    row = row_of(only_run(tmp_path / "four"))
    assert (row["processes"], row["replicas"], row["micro_batches"]) == (4, 2, 2)
    assert row["sizes"] == [4, 4]
    saved = [
        load_file(only_run(root) / "pretrained" / "model.safetensors")
        for root in (tmp_path / "four", runs)
    ]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[0].items():
        torch.testing.assert_close(weight, saved[1][name], rtol=1e-4, atol=1e-5)
    assert_same_errors(only_run(tmp_path / "four"), only_run(runs))


def test_a_run_that_is_being_trained_is_left_alone(tmp_path):
    arguments = ["grad=highway", "k=0", "parallel=layers", "parallel.timeout=60", "steps=20000"]
    first = torchrun(tmp_path, *arguments)
    wait_for_step(tmp_path, 3)
    out, err = torchrun(tmp_path, *arguments).communicate(timeout=300)
    assert "is being trained by another process, skipped" in out and "error" not in err
    first.terminate()
    first.communicate(timeout=300)


def test_a_hanging_process_is_named(tmp_path):
    process = torchrun(tmp_path, "grad=bp", "parallel=layers", "parallel.timeout=15", "steps=50000")
    wait_for_step(tmp_path, 5)
    os.kill(hanging := pid_of_rank(process, 1), signal.SIGSTOP)
    try:
        told = next(line for line in process.stderr if line.startswith("error:"))
    finally:
        os.kill(hanging, signal.SIGKILL)
    assert told == (
        "error: lost touch with rank 1, which has not answered for 15 s; expected all "
        "to be at work\n"
    )
    process.communicate(timeout=60)
    assert process.returncode != 0


def pid_of_rank(torchrun: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    )


def test_more_processes_than_layers_is_one_line(tmp_path):
    process = torchrun(tmp_path, "parallel=layers", "parallel.sizes=[1,1]")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    told = "error: parallel=layers: sizes=[1, 1]; expected 2 numbers of at least 1, 3 in all"
    assert err.count(told) == 1  # one of them tells
    assert "experiments/run.py" not in err  # torchrun's traceback alone
