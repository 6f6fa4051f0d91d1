"""train.py -m: sweeps that are interrupted, that fail in part, and that share the work."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

from experiments import checkpoint, devices
from experiments.run_folder import LOCK, is_busy
from tests.train_cli import (
    ROOT,
    assert_same,
    only_run,
    records_of,
    row_of,
    signal_after,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow

TINY = ["experiment=digits_tiny", "logger=none", "trainer.threads=1", "trainer.eval_interval=99"]


def sweep(root: Path, *arguments: str):
    """A sweep in a process of its own."""
    root.mkdir(exist_ok=True)
    return start("-m", *TINY, f"run_root={root}", *arguments, output=root.with_suffix(".out"))


def said(root: Path) -> str:
    return root.with_suffix(".out").read_text()


def finished(root: Path) -> set[Path]:
    return {file.parent for file in root.glob("*/DONE")}


def in_the_middle(root: Path, step: int = 3) -> list[Path]:
    """Runs that have begun and are not at their end."""
    files = [file for file in root.glob("*/metrics.jsonl") if file.parent not in finished(root)]
    return [file.parent for file in files if len(file.read_text().splitlines()) >= step]


def written(runs: set[Path]) -> dict[Path, int]:
    return {
        file: file.stat().st_mtime_ns for run in runs for file in run.iterdir() if file.name != LOCK
    }


def assert_complete(root: Path, whole: Path) -> None:
    """As many runs as in an uninterrupted sweep, of the same bits, no step recorded twice."""
    assert {run.name for run in finished(root)} == {run.name for run in finished(whole)}
    for run in finished(root):
        assert_same(run, whole / run.name)
        steps = [r["step"] for r in records_of(run) if "train_loss" in r]
        assert steps == list(range(1, row_of(run)["steps"] + 1))


def test_a_sweep_is_killed_and_terminated_and_ends_as_if_nothing_had_happened(train, tmp_path):
    arguments = ["grad=bp,highway", "k=0,1", "seed=0,1", "steps=8"]
    root, whole = tmp_path / "stopped", tmp_path / "whole"

    process = sweep(root, *arguments)
    wait_until(lambda: len(finished(root)) >= 1 and in_the_middle(root), process)
    assert [is_busy(run) for run in in_the_middle(root)] == [True]
    process.kill()
    process.join()
    before = written(finished(root))
    assert len(before) >= 1 and not any(map(is_busy, root.iterdir()))

    process = sweep(root, *arguments)
    wait_until(lambda: len(finished(root)) >= 3 and in_the_middle(root), process)
    (running,) = in_the_middle(root)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert "stopped by signal 15; the same command goes on from here" in said(root)
    stopped_at = torch.load(running / checkpoint.LATEST, weights_only=True)["step"]
    assert 3 <= stopped_at < 8 and running not in finished(root)
    before |= written(finished(root))

    resumed = train("-m", *TINY, f"run_root={root}", *arguments)
    assert resumed.code == 0
    assert f"{running}: going on after step {stopped_at}" in resumed.out
    assert resumed.out.count("finished already, skipped") >= 3
    assert before.items() <= written(finished(root)).items()
    assert len(finished(root)) == 6  # backpropagation once, not once per k

    assert train("-m", *TINY, f"run_root={whole}", *arguments).code == 0
    assert_complete(root, whole)


def test_a_parallel_sweep_is_terminated_and_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    # so many steps that no run ends, and the third begins, before the signal has come round
    arguments = ["grad=highway", "k=0", "steps=100", "trainer.eval_interval=50"]
    parallel = [*arguments, "seed=0,1,2", "hydra/launcher=local"]
    root, whole = tmp_path / "stopped", tmp_path / "whole"

    process = sweep(root, "model.depth=9,8", *parallel)
    wait_until(lambda: len(in_the_middle(root)) == 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert said(root).count("error: model: depth=9") == 3
    assert "3 of 6 runs failed: " in said(root)
    assert said(root).count("the same command goes on from here") == 1
    assert len(list(root.glob("*/started.json"))) == 2  # no other has begun
    assert len(list(root.glob(f"*/{checkpoint.LATEST}"))) == 2

    for last in (root, whole):  # with another launcher, which makes no difference
        process = sweep(last, *arguments, "seed=0")
        process.join()
        assert process.exitcode == 0
    assert_complete(root, whole)


def test_a_run_that_another_process_trains_is_skipped(train, runs):
    train("steps=2")
    (run := only_run(runs)).joinpath("DONE").unlink()
    with FileLock(run / LOCK):
        alone, swept = train("steps=2"), train("-m", "steps=2,1")
    assert (alone.code, alone.err) == (swept.code, swept.err) == (0, "")
    assert alone.out == f"{run} is being trained by another process, skipped\n"
    assert alone.out in swept.out and len(finished(runs)) == 1


def test_what_is_trained_where_is_written_before_it_begins(train, runs, monkeypatch):
    begun = []

    def begin(self):
        begun.append(json.loads((self.folder.path / "started.json").read_text()))
        begun.append(is_busy(self.folder.path))
        raise RuntimeError("far enough")

    monkeypatch.setattr("experiments.trainer.Trainer.train", begin)
    assert train("k=2", "seed=7", "steps=5").code == 1
    about, busy = begun
    expected = dict(experiment="digits_tiny", model="resnet20_preact", grad="highway", k=2)
    expected |= dict(schedule=None, seed=7, steps=5, pid=os.getpid())
    assert expected.items() <= about.items() and about["started"].endswith("+00:00")
    assert busy and not is_busy(only_run(runs))


@pytest.mark.parametrize("swept", [True, False])
def test_a_bug_in_one_job_shows_itself_and_the_others_go_on(train, runs, monkeypatch, swept):
    from experiments.trainer import Trainer

    whole = Trainer.train

    def buggy(self):
        if self.plan.cfg.seed == 1:
            raise RuntimeError("CUDA out of memory")
        return whole(self)

    monkeypatch.setattr(Trainer, "train", buggy)
    seen = train(*(["-m", "seed=0,1,2"] if swept else ["seed=1"]), "steps=1")
    assert seen.code == 1
    assert "Traceback" in seen.err and "RuntimeError: CUDA out of memory" in seen.err
    assert len(finished(runs)) == (2 if swept else 0)
    assert ("1 of 3 runs failed: " in seen.err and "seed=1" in seen.err) == swept


@pytest.mark.parametrize("values", ["k=1,two", "k=two,1", "trainer.log_interval=2,x"])
def test_a_wrong_value_is_no_repeat_of_a_right_one(train, runs, values):
    """Neither key makes another run: backpropagation has no k."""
    seen = train("-m", "grad=bp", values)
    assert seen.code == 1 and len(finished(runs)) == 1
    assert "expected" in seen.err and "1 of 2 runs failed" in seen.err


OF_SLURM = OmegaConf.load(ROOT / "configs" / "hydra" / "launcher" / "slurm.yaml")


def test_every_key_of_the_slurm_launcher_is_known_to_its_plugin():
    config = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    known = OmegaConf.structured(config.SlurmQueueConf)
    assert set(OF_SLURM) <= set(known) and OF_SLURM._target_ == known._target_


def test_a_job_of_submitit_writes_a_checkpoint_before_it_is_put_back(train, runs):
    at: list[int] = []

    def put_back(*_):  # submitit's handler
        at.append(torch.load(only_run(runs) / checkpoint.LATEST, weights_only=True)["step"])

    before = signal.signal(signal.SIGUSR2, put_back)
    try:
        with signal_after(5, signal.SIGUSR2):
            assert train().code == 128 + signal.SIGUSR2
        assert signal.getsignal(signal.SIGUSR2) is put_back
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert at == [5]


SLURM = {  # as much of it as submitit calls for one job, on this machine
    # The script is read before sbatch returns: submitit renames it then.
    "sbatch": """export SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0
export SLURM_JOB_NODELIST=here SLURM_PROCID=0 SLURM_LOCALID=0
cd "$(dirname "$0")" && cp "$1" job.sh
{ bash job.sh; touch ended; } >/dev/null 2>&1 </dev/null &
echo Submitted batch job 7""",
    "srun": 'while [ "$1" != "$PYTHON" ]; do shift || exit 1; done; exec "$@"',
    "sacct": """cd "$(dirname "$0")" && [ -e ended ] && state=COMPLETED || state=RUNNING
echo 'JobID|State|NodeList'
echo "7|$state|here"
""",
}


def through_slurm(folder: Path, *arguments: str, **scripts: str) -> subprocess.Popen:
    """A sweep of one job, submitted to what `SLURM` and ``scripts`` say."""
    for name, script in {**SLURM, **scripts}.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment = {**os.environ, **path, "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, str(ROOT / "train.py"), "-m", *TINY, f"run_root={folder / 'runs'}"),
        *("hydra/launcher=slurm", "hydra.launcher.partition=gpu", *arguments),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({}, "1 of 1 runs failed: "),  # the job's own outcome
        ({"srun": "exit 1"}, "error: SlurmLauncher: Job 7 (task: 0) with path "),
        (
            {"sbatch": "echo no such partition >&2; exit 1"},
            "error: SlurmLauncher: no such partition;",
        ),
    ],
)
def test_a_sweep_goes_through_slurm_and_comes_back(tmp_path, scripts, said):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = through_slurm(tmp_path, "model.depth=9", **scripts)
    _, err = process.communicate()
    *sbatch, line = err.splitlines()
    assert process.returncode == 1 and line.startswith(said)
    assert sbatch == ["no such partition"] * ("sbatch" in scripts)
    assert line.endswith("; the same command resumes" if scripts else "model.depth=9")


def test_a_sweep_in_slurms_queue_may_be_left(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = through_slurm(tmp_path, srun="sleep 20")
    wait_until(lambda: [*tmp_path.rglob("7_submission.sh")])  # it has been submitted
    process.terminate()  # SIGINT is ignored in what a shell runs in the background
    _, err = process.communicate()
    assert (process.returncode, err) == (-signal.SIGTERM, "")


def test_without_locks_a_run_says_so_and_goes_on(train, runs, monkeypatch):
    def refuse(self, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("experiments.run_folder.FileLock.acquire", refuse)
    seen = train("steps=1")
    assert seen.code == 0 and len(finished(runs)) == 1
    assert "cannot be locked ([Errno 37] No locks available)" in seen.out


def test_gpus_are_shared_evenly(tmp_path):
    names = ["0", " 3", "GPU-a/1"]
    taken = [devices.first_free(names, tmp_path) for _ in range(7)]
    assert [name for name, _ in taken] == ["0", "3", "GPU-a/1", "0", "3", "GPU-a/1", "0"]
    taken[1][1].release()
    assert devices.first_free(names, tmp_path)[0] == "3"
    for _, lock in taken:
        lock.release()


@pytest.mark.parametrize(
    ("count", "given", "seen"),
    [(0, None, None), (1, None, None), (1, "3", "3"), (2, None, "0"), (2, "5,6", "5")],
)
def test_a_process_takes_one_of_several_gpus(tmp_path, monkeypatch, count, given, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(devices.VISIBLE, "" if given is None else given)
    if given is None:
        monkeypatch.delenv(devices.VISIBLE)
    monkeypatch.setattr(devices, "_held", [])
    devices.take_one_gpu()
    assert os.environ.get(devices.VISIBLE) == seen
    for lock in devices._held:
        lock.release()
