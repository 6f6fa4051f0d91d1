"""torchrun train.py parallel=layers: processes train as one, go on after one has died, and name the
one that fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file

from experiments import checkpoint
from experiments.config import GROUPS, composed
from experiments.errors import UserError
from experiments.identity import flat
from experiments.plan import Plan
from experiments.processes import check_alike
from tests.train_cli import ROOT, numbers, only_run, records_of, row_of, start, wait_for_step

pytestmark = pytest.mark.slow

TINY = ["experiment=digits_tiny", "logger=none", "trainer.threads=1", "trainer.channels_last=false"]


def command(root: Path, *arguments: str) -> list[str]:
    given = {argument.split("=")[0] for argument in arguments}
    defaults = [default for default in TINY if default.split("=")[0] not in given]
    return [*defaults, f"run_root={root}", "parallel=layers", *arguments]


def torchrun(
    root: Path, *arguments: str, restarts: int = 0, program: str = "train.py"
) -> subprocess.Popen:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    starter += ["--nproc-per-node=2", f"--max-restarts={restarts}", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*starter, *command(root, *arguments)], cwd=ROOT, text=True, env=environment, **pipes
    )


class Ranks:
    """train.py on processes in the environment that torchrun gives them, started in less time.

    Args:
        last: an argument of the last process alone.
    """

    def __init__(self, root: Path, *arguments: str, size: int = 2, last: str | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        root.mkdir(exist_ok=True)
        self.outputs = [root / f"{port}.{rank}.out" for rank in range(size)]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        for rank, output in enumerate(self.outputs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            more = [last] if last and rank == size - 1 else []
            arguments_ = [*command(root, *arguments), *more]
            self.processes.append(start(*arguments_, output=output, environment=environment))

    def ended(self) -> str:
        """What all have printed, when all are done or one has failed and the others were ended."""
        running = list(self.processes)
        while running and not any(process.exitcode for process in self.processes):
            connection.wait([process.sentinel for process in running], timeout=300)
            running = [process for process in running if process.is_alive()]
        for process in running:  # as torchrun does it
            process.terminate()
            process.join(5)
            process.kill()
            process.join()
        return "".join(output.read_text() for output in self.outputs)

    @property
    def codes(self) -> list[int]:
        return [process.exitcode for process in self.processes]


def errors(printed: str) -> list[str]:
    """Without what was said of the run before."""
    prefix = "error: "
    assert "Traceback" not in printed
    return [x.removeprefix(prefix) for x in printed.splitlines() if x.startswith(prefix)]


def pid_of_rank(torchrun: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    )


def test_processes_that_are_stopped_and_killed_train_as_one_to_the_bit(train, runs, tmp_path):
    arguments = ["grad=highway", "k=0", "steps=60"]
    ranks = Ranks(tmp_path, *arguments)
    run = wait_for_step(tmp_path, 10)
    ranks.processes[1].terminate()
    assert ranks.ended().count("stopped by signal 15; the same command") == 1
    assert ranks.codes == [128 + signal.SIGTERM] * 2
    step = torch.load(run / checkpoint.LATEST, weights_only=True)["step"]
    assert 0 < step == records_of(run)[-1]["step"] < 60
    process = torchrun(tmp_path, *arguments, restarts=1)
    wait_for_step(tmp_path, step + 15)
    os.kill(pid_of_rank(process, 0), signal.SIGKILL)
    assert train(*arguments, *TINY[2:], "grad.group_size=2").code == 0
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("s of training") == 1  # one of them reports
    assert "failed (exitcode: -9) local_rank: 0" in err
    for a, b in zip(records_of(run), records_of(only_run(runs)), strict=True):
        assert numbers(a) == numbers(b)


def test_replicas_on_real_text_train_as_one_process_with_the_groups(train, runs, tmp_path):
    """Two replicas, each on two processes, in micro-batches; a schedule that measures errors."""
    arguments = [
        *("experiment=topics_tiny", "model=gpt2", "model.layers=4", "model.hidden=16"),
        *("model.heads=2", "optim.batch_size=8", "steps=12", "grad=highway"),
        *("schedule=adaptive", "schedule.ks=[0,1,5]", "schedule.budget=0.9"),
        *("schedule.tolerance=0.1", "diagnostics=figure6", "diagnostics.at=[0,0.5]"),
    ]
    cut = ["parallel.data=2", "parallel.micro_batches=2", "parallel.sizes=[5,3]"]
    ranks = Ranks(tmp_path / "four", *arguments, *cut, size=4)
    assert train(*arguments, "grad.group_size=5", *TINY[2:]).code == 0
    printed = ranks.ended()
    assert ranks.codes == [0] * 4, printed
    four, one = only_run(tmp_path / "four"), only_run(runs)
    assert {0, 1, None} == {r["k"] for r in records_of(one) if "k" in r}
    assert sum("gradient_error" in r for r in records_of(one)) == 2
    for a, b in zip(records_of(four), records_of(one), strict=True):
        assert (a.get("k"), a.get("iterations")) == (b.get("k"), b.get("iterations"))
        for key in a.keys() & {"train_loss", "eval_loss"}:
            assert a[key] == pytest.approx(b[key], abs=1e-6)
        for e, f in zip(a.get("gradient_error", []), b.get("gradient_error", []), strict=True):
            assert e["relative_error"] == pytest.approx(f["relative_error"], rel=1e-3, abs=1e-4)
            assert e["layers"].keys() == f["layers"].keys()
    row = row_of(four)
    assert (row["processes"], row["replicas"], row["micro_batches"]) == (4, 2, 2)
    assert row["sizes"] == [5, 3] and row["config_hash"] != row_of(one)["config_hash"]
    for key in ("L", "block_passes", "sequential_passes"):
        assert row[key] == row_of(one)[key]
    saved, expected = (load_file(run / "pretrained" / "model.safetensors") for run in (four, one))
    assert saved.keys() == expected.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_a_run_is_left_alone_while_it_is_trained_and_a_hanging_process_named(tmp_path):
    arguments = ["grad=highway", "k=0", "parallel.timeout=6", "steps=50000"]
    ranks = Ranks(tmp_path, *arguments)
    wait_for_step(tmp_path, 5)
    others = Ranks(tmp_path, *arguments)
    printed = others.ended()
    assert "is being trained by another process, skipped" in printed and "error" not in printed
    assert others.codes == [0, 0]
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    assert errors(ranks.ended()) == [
        "a process does not answer: [Rank 0]: Ranks 1 failed to pass monitoredBarrier in 6000 ms"
    ]
    assert ranks.codes == [1, -signal.SIGKILL]


ONE_FAILS = """
import os, runpy
from experiments.errors import UserError
from experiments.trainer import Trainer
step = Trainer._step

def failing(self):
    if self.step == 3 and os.environ["RANK"] == "1":
        raise UserError("no data")
    step(self)

Trainer._step = failing
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_mistake_is_reported_once(tmp_path):
    program = tmp_path / "one_fails.py"
    program.write_text(ONE_FAILS)
    one = torchrun(tmp_path / "one", program=str(program))
    every = Ranks(tmp_path / "every", "parallel.sizes=[1,1]")
    (line,) = errors(every.ended())
    assert line.startswith("parallel=layers: sizes=[1, 1]; expected 2 numbers of at least 1, 3 in")
    _, err = one.communicate(timeout=300)
    assert one.returncode != 0
    assert err.startswith("error: rank 1: no data") and err.count("error: ") == 1
    assert "experiments/run.py" not in err  # torchrun's traceback alone


@pytest.mark.parametrize(
    ("apart", "line"),
    [
        ("optim.lr=0.01", "optim.lr is 0.05 on rank 0 and 0.01 on rank 1; expected the same"),
        ("parallel=none", "rank 1: parallel=none with WORLD_SIZE=2; expected parallel=layers"),
    ],
)
def test_processes_of_different_settings_are_refused(tmp_path, apart, line):
    begun = time.monotonic()
    (error,) = errors(Ranks(tmp_path, last=apart).ended())
    assert error.startswith(line)
    assert time.monotonic() - begun < 60  # parallel.timeout is ten minutes
    assert not list(tmp_path.glob("*/metrics.jsonl"))


def test_every_key_is_compared():
    cfg, choices = composed("experiment=digits_tiny", "diagnostics=figure6"), dict.fromkeys(GROUPS)
    settings = Plan(cfg, choices | {"schedule": "constant"}).settings
    everything = dict(flat(OmegaConf.to_container(cfg, resolve=True)))
    assert settings.keys() == everything.keys() | set(GROUPS)
    check_alike(store_with(settings), 0, 2, settings)
    for key in settings:
        for other in (settings | {key: "another"}, {k: settings[k] for k in settings if k != key}):
            with pytest.raises(UserError, match=rf"^{re.escape(key)} is .* on rank 0 and .* on"):
                check_alike(store_with(other), 0, 2, settings)


def store_with(settings: dict) -> dist.Store:
    """In which the second process has said what it has."""
    store = dist.HashStore()
    store.set("settings/1", json.dumps(settings))
    return store


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("parallel=none", "parallel=none with WORLD_SIZE=3; expected parallel=layers under torch"),
        ("parallel.data=2", "parallel.data=2 with 3 processes; expected torchrun's number to be"),
        ("parallel.sizes=fast", "parallel.sizes=fast; expected whole numbers of layers"),
        ("parallel.sizes=3", "parallel.sizes=3; expected whole numbers of layers"),
        ("parallel.sizes=[2,x]", "parallel.sizes=[2, 'x']; expected whole numbers of layers"),
        ("-m", "parallel=layers in a sweep; expected one run per torchrun"),
    ],
)
def test_what_cannot_be_shared_out(train, monkeypatch, argument, line):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    outcome = train(argument, *([] if "=none" in argument else ["parallel=layers"]))
    assert outcome.code == 1
    assert line in outcome.err and outcome.err.count("error: ") == 1
