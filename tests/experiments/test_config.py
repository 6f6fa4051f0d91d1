"""What the configuration chooses: the paper's recipe by the model alone, and each preset's row."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.config import config_hash, identity, register_schema
from tests.train_cli import ROOT

PRESETS = sorted(file.stem for file in (ROOT / "configs" / "experiment").glob("*.yaml"))
MODELS = sorted(file.stem for file in (ROOT / "configs" / "model").glob("*.yaml"))


@pytest.fixture
def composed():
    register_schema()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


def recipe(cfg: DictConfig) -> tuple:
    return cfg.data.name, cfg.optim.epochs, cfg.optim.batch_size, cfg.optim.warmup_steps


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet32_preact", ("uoft-cs/cifar10", 200, 128, 0)),
        ("resnet110", ("uoft-cs/cifar10", 200, 128, 0)),
        ("resnet56", ("benjamin-paine/imagenet-1k-32x32", 100, 128, 0)),
    ],
)
def test_a_model_brings_the_papers_recipe(composed, model, expected):
    cfg = composed(f"model={model}")
    assert recipe(cfg) == expected
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay) == (0.1, 0.9, 1e-4)
    assert list(cfg.optim.drops) == [0.5, 0.75]


def test_the_command_line_has_the_last_word(composed):
    cfg = composed("model=resnet110", "data=digits", "optim=sgd_resnet110", "optim.lr=0.02")
    assert "digits" in cfg.data._target_
    assert (cfg.optim.warmup_steps, cfg.optim.lr) == (400, 0.02)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_built(composed, model):
    cfg = composed(f"model={model}")
    built = instantiate(cfg.model, classes=10)
    depth = int("".join(c for c in model.removesuffix("_preact") if c.isdigit()))
    assert len(built.chain) == (depth - 2) // 2
    assert cfg.model.preact == model.endswith("_preact")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_sets_model_and_data(composed, preset):
    cfg = composed(f"experiment={preset}")
    assert cfg.model._target_ == "models.resnet.ResNet"
    named = preset.split("_")[0]
    if named.startswith("resnet"):
        assert str(cfg.model.depth) == named.removeprefix("resnet")
        assert cfg.steps is None  # the paper's epochs
    else:
        assert cfg.steps is not None


def test_methods_get_the_root_k(composed):
    assert composed("grad=highway", "k=4").grad.k == 4
    assert composed("grad=fixed_point", "k=2").grad.k == 2
    assert "k" not in composed("grad=bp", "k=2").grad


def test_paths_and_devices_are_not_part_of_the_identity(composed, tmp_path: Path):
    here = composed("experiment=resnet32_cifar10")
    there = composed("experiment=resnet32_cifar10", f"data.root={tmp_path}", "device=cpu",
                     f"run_root={tmp_path}", "seed=3", "trainer.threads=1")  # fmt: skip
    assert config_hash(identity(here)) == config_hash(identity(there))

