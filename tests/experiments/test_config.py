"""What the configuration chooses: a row's recipe by the model alone, and what presets set."""

import re
import subprocess
import sys

import pytest
from hydra.utils import instantiate

from experiments.command_line import EXAMPLES
from experiments.config import RANGES, composed
from experiments.identity import identity
from tests.experiments.test_presets import LAUNCHES
from tests.train_cli import ROOT

RESNETS = {file.stem for file in (ROOT / "configs" / "model").glob("resnet*.yaml")}


@pytest.mark.parametrize("row", LAUNCHES)
def test_a_model_alone_brings_its_rows_recipe(row):
    alone, named = composed(f"model={LAUNCHES[row][0]}"), composed(f"experiment={row}")
    assert identity(alone, "cpu") == identity(named, "cpu")


def test_the_command_line_has_the_last_word():
    cfg = composed("model=resnet110", "data=digits", "optim=sgd_resnet110", "optim.lr=0.02")
    assert "digits" in cfg.data._target_
    assert (cfg.optim.warmup_steps, cfg.optim.lr) == (400, 0.02)


@pytest.mark.parametrize("model", sorted(RESNETS - {"resnet50"}))  # torchvision's
def test_every_resnet_can_be_built(model):
    cfg = composed(f"model={model}")
    built = instantiate(cfg.model, classes=10)
    depth = int("".join(c for c in model.removesuffix("_preact") if c.isdigit()))
    assert len(built.chain) == (depth - 2) // 2
    assert cfg.model.preact == model.endswith("_preact")


def test_help_says_what_every_key_is_for_and_its_examples_compose(train):
    told = train("--help").out
    keys = {
        line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith("    ")
    }
    for key in {key.rpartition(".")[2] for key in RANGES}:
        assert keys[key], key
    for file in (ROOT / "configs").glob("*/*.yaml"):
        assert f" {file.stem} " in told.replace("\n", " "), file
    examples = [line.partition("train.py ")[2].partition("  ")[0] for line in EXAMPLES.splitlines()]
    assert len(examples) == 6 and all(told.count(example) for example in examples)
    for example in examples:
        first = (argument.split(",")[0] for argument in example.split() if "=" in argument)
        assert composed(*first).grad


@pytest.mark.parametrize("argument", ["--help", "k=-1"])
def test_what_trains_nothing_does_not_wait_for_torch(argument):
    command = [sys.executable, "-X", "importtime", ROOT / "train.py", argument]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    imported = re.findall(r"\| +(\w+)\n", said)
    assert "hydra" in imported and "torch" not in imported


@pytest.mark.parametrize(
    ("progress", "minute", "lines"), [("auto", 0.0, 6), ("auto", 60.0, 0), ("false", 0.0, 0)]
)
def test_off_a_terminal_training_prints_a_line_a_minute(
    train, monkeypatch, progress, minute, lines
):
    monkeypatch.setattr("experiments.trainer.MINUTE", minute)
    out = train(f"trainer.progress={progress}").out
    assert out.count(" of 6, loss ") == lines
    assert (", eval_accuracy 0." in out) == (lines > 0)
