"""What the configuration chooses: the paper's recipe by the model alone, and each preset's row."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.config import config_hash, identity, register_schema
from tests.train_cli import ROOT

PRESETS = sorted(file.stem for file in (ROOT / "configs" / "experiment").glob("*.yaml"))
RESNETS = sorted(file.stem for file in (ROOT / "configs" / "model").glob("resnet*.yaml")
                 if file.stem != "resnet50")  # torchvision's
# The rows of recurrent networks: vocabulary or classes, and the paper's number of parameters.
RNNS = {
    "lstm_char": ({"vocabulary": 210}, 2.32e6),
    "gru_char": ({"vocabulary": 210}, 1.79e6),
    "gru_words": ({"vocabulary": 16000}, 21.1e6),
    "gru_pixels": ({"classes": 10}, 29.8e3),
}


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


@pytest.mark.parametrize("model", RNNS)
def test_recurrent_networks_have_the_papers_parameters_and_recipe(composed, model):
    cfg = composed(f"model={model}")
    arguments, parameters = RNNS[model]
    built = instantiate(cfg.model, **arguments)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert trained == pytest.approx(parameters, rel=2.5e-3)
    assert (cfg.optim.algorithm, cfg.optim.schedule, cfg.optim.batch_size) == (
        "adam", "cosine", 128)  # fmt: skip
    assert (cfg.optim.lr, cfg.optim.final_lr) == (1e-3, 1e-4)
    steps = (2500, 250) if model == "gru_pixels" else (10000, 1000)
    assert (cfg.optim.steps, cfg.optim.warmup_steps) == steps


@pytest.mark.parametrize("model", RESNETS)
def test_every_resnet_can_be_built(composed, model):
    cfg = composed(f"model={model}")
    built = instantiate(cfg.model, classes=10)
    depth = int("".join(c for c in model.removesuffix("_preact") if c.isdigit()))
    assert len(built.chain) == (depth - 2) // 2
    assert cfg.model.preact == model.endswith("_preact")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_sets_model_and_data(composed, preset):
    cfg = composed(f"experiment={preset}")
    named, *data = preset.split("_")
    if named in ("digits", "topics", "grammar"):
        assert cfg.steps is not None
        return
    assert cfg.steps is None  # the paper's, or the model's
    assert (cfg.optim.steps is None) != (cfg.optim.epochs is None)
    if named in ("resnet32", "resnet110", "resnet56"):
        assert str(cfg.model.depth) == named.removeprefix("resnet")
    elif named in ("gru", "lstm"):
        assert cfg.model.cell == named if data[-1] != "pixels" else "cell" not in cfg.model
    if "tokenizer" in cfg.data and data[-1] in ("chars", "words"):
        assert cfg.data.tokenizer == {"chars": "characters", "words": "bpe"}[data[-1]]
        assert cfg.model.layers == (3 if data[-1] == "words" else 1)


def test_methods_get_the_root_k(composed):
    assert composed("grad=highway", "k=4").grad.k == 4
    assert composed("grad=fixed_point", "k=2").grad.k == 2
    assert "k" not in composed("grad=bp", "k=2").grad


def test_paths_and_devices_are_not_part_of_the_identity(composed, tmp_path: Path):
    here = composed("experiment=resnet32_cifar10")
    there = composed("experiment=resnet32_cifar10", f"data.root={tmp_path}", "device=cpu",
                     f"run_root={tmp_path}", "seed=3", "trainer.threads=1")  # fmt: skip
    assert config_hash(identity(here)) == config_hash(identity(there))

