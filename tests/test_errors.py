"""tests/errors.md has the usual lines that wrong input gives; here each is provoked.

A first column in backticks is what stands behind ``python train.py``; any other first column is a
situation of that name below. ``…`` stands for whatever differs by machine.
"""

import re
import resource
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra.core.plugins import Plugins
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.data.pairs import LABELS
from experiments.run_folder import LOCK
from models.pair_classifier import PairClassifier
from tests.train_cli import only_run
from tests.wrong_use import METHOD, RAISED

PAGE = Path(__file__).with_name("errors.md")


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| situation")
    ]


ROWS = rows(PAGE.read_text())
LIBRARY = rows(PAGE.read_text().partition("## In the library")[2])
SITUATIONS = {}


def situation(function):
    SITUATIONS[function.__name__.replace("_", " ")] = function
    return function


def matches(documented: str, seen: str) -> bool:
    parts = [re.escape(part) for part in documented.strip("`").split("…")]
    return re.fullmatch(".*?".join(parts), seen, re.DOTALL) is not None


@pytest.mark.slow
@pytest.mark.parametrize(("what", "line"), [r for r in ROWS if r[0].startswith("`")])
def test_command_line(train, runs, what, line):
    seen = train(*what.strip("`").split())
    assert seen.code == 1
    assert matches(line, seen.err.strip()), seen.err
    assert "\n" not in seen.err.strip()


@pytest.mark.parametrize(
    ("what", "line"),
    [
        pytest.param(*row, marks=() if row in LIBRARY else pytest.mark.slow)
        for row in ROWS
        if not row[0].startswith("`")
    ],
)
def test_situation(train, runs, tmp_path, monkeypatch, what, line):
    seen = SITUATIONS[what](train, runs, tmp_path)
    assert matches(line, seen.strip()), seen


def test_every_situation_is_documented():
    assert set(SITUATIONS) == {what for what, _ in ROWS if not what.startswith("`")}


def raised(error: type[Exception], call) -> str:
    with pytest.raises(error) as told:
        call()
    return str(told.value)


for error, situations in RAISED.items():
    for what, call in situations.items():
        SITUATIONS[what] = lambda *_, error=error, call=call: raised(error, call)

PRINTED = {  # by train.py: its arguments, and which line of the output, or None for stderr
    "a k that has no effect": ("grad=bp k=5 steps=1", 0),
    "a gamma that has no effect": ("grad=fixed_point gamma=0.2 steps=1", 0),
    "a k larger than L in training": ("k=5 steps=1", 1),
    "epochs beside steps": ("grad=bp steps=1 optim.epochs=2", 0),
    "a setting of processes for one process": ("grad=bp steps=1 +parallel.data=2", 0),
    "a k that the schedule sets": ("schedule=milestones k=5", 0),
    "a tokenizer that cannot be had": (
        "experiment=minilm_nli_mix data.tokenizer=package:nowhere.at/model",
        None,
    ),
    "image folders without a place": ("experiment=resnet50_image_folder", None),
    "a run folder that cannot be written": ("run_root=/dev/null/runs", None),
    "a failing run in a sweep": ("--multirun model.depth=9,8 steps=1", None),
    "an unknown value in a sweep": ("--multirun grad=higway,bp seed=0,1 steps=1", None),
}


def printed(train, arguments: str, line: int | None) -> str:
    seen = train(*arguments.split())
    return in_one_line(seen.err) if line is None else seen.out.splitlines()[line]


def in_one_line(said: str) -> str:
    return said.strip().replace("\n", "⏎")


SITUATIONS.update(
    {what: lambda train, *_, it=it: printed(train, *it) for what, it in PRINTED.items()}
)


@situation
def a_chain_of_layers_without_residual_connections(*_):
    torch.manual_seed(0)
    chain = hb.ResidualChain([nn.Linear(64, 64) for _ in range(4)], METHOD)
    with pytest.warns(UserWarning) as told:
        chain(torch.randn(8, 64)).sum().backward()
        chain(torch.randn(8, 64)).sum().backward()
    assert len(told) == 1
    return str(told[0].message)


def with_pretrained(vocabulary: int, labels: list[str]):
    def situation(train, runs, tmp_path):
        sizes = dict(layers=1, hidden=8, heads=2, length=32)
        model = PairClassifier(vocabulary=vocabulary, padding=0, labels=labels, **sizes)
        model.save_pretrained(str(tmp_path / "m"))
        return train("experiment=grammar", f"model.pretrained={tmp_path / 'm'}").err

    return situation


SITUATIONS["a tokenizer that does not match the model"] = with_pretrained(9, LABELS)
SITUATIONS["label names in another order"] = with_pretrained(99, LABELS[::-1])


def with_files_of(*splits: str):
    def situation(train, runs, tmp_path):
        folder = tmp_path / "data" / "uoft-cs" / "cifar10" / "plain_text"
        folder.mkdir(parents=True)
        for split in splits:
            file = folder / f"{split}-00000-of-00001.parquet"
            file.write_bytes(f"PAR1 and no {split}".encode())
        return train("data=cifar10", f"data.root={tmp_path / 'data'}").err

    return situation


SITUATIONS["a data file cut off"] = with_files_of("train", "test")
SITUATIONS["a data file missing"] = with_files_of()


@situation
def a_damaged_checkpoint(train, runs, tmp_path):
    stop_after(train, 5)
    damage(only_run(runs) / checkpoint.LATEST)
    resumed = train("steps=6")
    assert resumed.code == 0
    return resumed.out.splitlines()[1]


@situation
def all_checkpoints_damaged(train, runs, tmp_path):
    stop_after(train, 5)
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        damage(only_run(runs) / name)
    return train("steps=6").err


@situation
def a_checkpoint_of_another_configuration(train, runs, tmp_path):
    train("steps=1")
    folder = only_run(runs)
    (folder / "DONE").unlink()
    state = torch.load(folder / checkpoint.LATEST, weights_only=True)
    torch.save({**state, "config_hash": "00000000"}, folder / checkpoint.LATEST)
    return train("steps=1").err


@situation
def a_file_that_cannot_grow(train, runs, tmp_path):
    """As on a full disk: the kernel refuses to write beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        seen = train("steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen.code == 1
    assert train("steps=2").code == 0  # with room again, the same command ends well
    return seen.err


@situation
def a_run_that_another_process_trains(train, runs, tmp_path):
    train("steps=1")
    (only_run(runs) / "DONE").unlink()
    with FileLock(only_run(runs) / LOCK):
        return train("steps=1").out


@situation
def a_launcher_that_is_not_installed(train, *_):
    with pytest.MonkeyPatch.context() as patch:
        plugin = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
        patch.delitem(Plugins.instance().class_name_to_class, plugin, raising=False)
        return train("--multirun", "k=0,1", "hydra/launcher=local").err


def stop_after(train, steps: int) -> None:
    """A run whose process ended without a word after ``steps`` steps."""
    from experiments.trainer import Trainer

    whole = Trainer._step

    def dying(self):
        if self.step == steps:
            raise SystemExit(99)
        return whole(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        assert train("steps=6").code == 99


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
