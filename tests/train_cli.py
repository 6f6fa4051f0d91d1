"""train.py driven as from the command line, in this process: what it prints and its exit code."""

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parent.parent


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
