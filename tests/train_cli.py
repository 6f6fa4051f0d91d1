"""train.py driven as from the command line, in this process or another, and what a run leaves."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from experiments import checkpoint
from experiments.config import CONFIGS, register_help
from experiments.plan import Plan
from experiments.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
# Seconds and memory belong to the machine; all else of a run is repeated bit for bit.
MACHINE = ("seconds", "cpu_seconds", "peak_memory_mb", "wandb_id")
ASKED = ("overrides", "config")  # how the run was asked for
TINY_GPT = (
    *("experiment=topics_tiny", "model=gpt2_small", "data=topics_words", "data.length=16"),
    *("data.vocabulary=300", "model.layers=3", "model.hidden=8", "optim.batch_size=4"),
)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


def command_line(*arguments: str) -> None:
    """What ``python train.py`` does; ends in SystemExit."""
    sys.argv = [str(ROOT / "train.py"), *arguments]
    GlobalHydra.instance().clear()
    runpy.run_path(sys.argv[0], run_name="__main__")


def planned(*arguments: str) -> Plan:
    """What train.py makes of a command line."""
    register_help()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", list(arguments), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return Plan(cfg, choices, list(arguments))


def start(
    *arguments: str, output: Path | None = None, environment: Mapping[str, str] | None = None
) -> multiprocessing.Process:
    """train.py in a process of its own, which may be killed; what it prints goes to a file."""
    processes = multiprocessing.get_context("forkserver")  # imports are done once: see conftest.py
    process = processes.Process(target=_into_file, args=[output, environment or {}, *arguments])
    process.start()
    return process


def _into_file(output: Path | None, environment: Mapping[str, str], *arguments: str) -> None:
    os.environ |= environment
    if output is not None:
        into_file(output)
    command_line(*arguments)


def into_file(output: Path) -> None:
    """Whatever this process prints from now on goes to the file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)


def wait_until(condition: Callable[[], object], process=None, pause: float = 0.01) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process is None or process.is_alive(), "it ended too early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def wait_for_step(root: Path, step: int) -> Path:
    """The folder of the only run below ``root``, when it has come so far."""
    wait_until(lambda: count_lines(root) >= step)
    return only_run(root)


def start_and_kill(root: Path, lines: int, *arguments: str, pause: float = 0.0) -> None:
    """A run below ``root`` that is killed when so many records are there and a pause is over."""
    process = start(*arguments, f"run_root={root}")
    wait_until(lambda: count_lines(root) >= lines or not process.is_alive(), pause=0.002)
    time.sleep(pause)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@contextmanager
def signal_after(step: int, number: signal.Signals) -> Iterator[None]:
    """This process gets the signal as soon as the training step is recorded."""
    append = RunFolder.append

    def interrupted(self, record):
        append(self, record)
        if record["step"] == step and "train_loss" in record:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", interrupted)
        yield


@pytest.fixture
def train(runs, capsys, monkeypatch):
    """``train("grad=bp", ...)`` runs the tiny preset without wandb below ``runs``."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*overrides: str) -> Outcome:
        defaults = ["experiment=digits_tiny", "logger=none", f"run_root={runs}"]
        given = {override.split("=")[0] for override in overrides}
        kept = [d for d in defaults if d.split("=")[0] not in given]
        monkeypatch.setattr(sys, "argv", sys.argv)
        with pytest.raises(SystemExit) as exit_:
            command_line(*overrides, *kept)
        captured = capsys.readouterr()
        return Outcome(exit_.value.code, captured.out, captured.err)

    return run


def only_run(runs: Path) -> Path:
    (folder,) = (path for path in runs.iterdir() if path.is_dir())
    return folder


def row_of(folder: Path) -> dict:
    return json.loads((folder / "row.json").read_text())


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def count_lines(root: Path) -> int:
    """Metrics recorded so far, in all runs below a folder."""
    return sum(len(file.read_text().splitlines()) for file in root.glob("*/metrics.jsonl"))


def numbers(record: dict) -> dict:
    """What a repeated run has in common with the first, to the bit."""
    return {key: value for key, value in record.items() if key not in (*MACHINE, *ASKED)}


def outcome(folder: Path) -> tuple[dict, list[dict], dict]:
    state = torch.load(folder / checkpoint.LATEST, weights_only=True)
    return numbers(row_of(folder)), [numbers(r) for r in records_of(folder)], state["model"]


def assert_same(a: Path, b: Path) -> None:
    """Two runs, one of them perhaps interrupted, have ended in the same bits."""
    (row_a, records_a, model_a), (row_b, records_b, model_b) = outcome(a), outcome(b)
    assert row_a == row_b
    assert records_a == records_b
    assert model_a.keys() == model_b.keys()
    assert all(torch.equal(model_a[name], model_b[name]) for name in model_a)
