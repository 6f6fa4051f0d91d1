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

from tests.train_cli import ROOT, numbers, only_run, records_of, row_of

TINY = ["experiment=digits_tiny", "logger=none", "trainer.threads=1", "trainer.channels_last=false"]


def torchrun(root: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "train.py", *TINY, f"run_root={root}", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


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
    assert row_of(two)["L"] == 2 and row_of(two)["config_hash"] != row_of(one)["config_hash"]


def test_a_killed_process_costs_no_more_than_its_steps(tmp_path):
    arguments = ["grad=highway", "k=0", "parallel=layers", "steps=200"]
    whole = torchrun(tmp_path / "whole", *arguments)
    killed = torchrun(tmp_path / "killed", *arguments, restarts=1)
    kill_at_step(tmp_path / "killed", 60)
    for process in (whole, killed):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    a, b = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [numbers(r) for r in records_of(a)] == [numbers(r) for r in records_of(b)]
    assert numbers(row_of(a)) == numbers(row_of(b))


def kill_at_step(root: Path, step: int) -> None:
    """The first process of the run, once it has come to that step."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        for file in root.glob("*/metrics.jsonl"):
            if len(file.read_text().splitlines()) >= step:
                pid = json.loads((file.parent / "started.json").read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.02)
    raise AssertionError("the run has not come that far")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["parallel=layers"], "parallel=layers: not started by torchrun"),
        (["parallel=layers", "advise=true"], "advise, diagnostics and schedule=adaptive"),
    ],
)
def test_mistakes_are_one_line(train, arguments, told):
    outcome = train(*arguments)
    assert outcome.code == 1
    assert told in outcome.err and outcome.err.count("\n") == 1


def test_more_processes_than_layers_is_one_line(tmp_path):
    process = torchrun(tmp_path, "parallel=layers", "parallel.sizes=[1,1]")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: parallel=layers: sizes=[1, 1]; expected 2 numbers of at least 1, 3 in all" in err
    assert "experiments/run.py" not in err  # torchrun's traceback alone
