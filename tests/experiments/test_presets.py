"""The nine rows of the paper's Table 2: each preset to the letter, and each one launched."""

import math
import socket
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import highway_bp as hb
from experiments.data.images import SIZE
from experiments.optimizer import learning_rate
from scripts.evidence.paper import paper_rows
from tests.experiments import hub_layout
from tests.train_cli import only_run, records_of, row_of

pytestmark = pytest.mark.slow

CIFAR10, IMAGENET32 = "uoft-cs/cifar10", "benjamin-paine/imagenet-1k-32x32"
WIKITEXT, GLUE, MATCHED = "Salesforce/wikitext", "nyu-mll/glue", "validation_matched"

# The paper's settings, as arguments of train.py; of the keys that a row lacks and another one has,
# the configuration has none, or null.
# The paper prints no beta1 and, for recurrent networks, no beta2, weight decay or clip: the usual.
RESNET = (
    "optim.algorithm=sgd optim.momentum=0.9 optim.lr=0.1 optim.schedule=drops "
    "optim.drops=[0.5,0.75] optim.batch_size=128 optim.warmup_steps=0 optim.weight_decay=1e-4 "
    "gamma=0.0 model.downsampling=paper data.augment=true data.flip=true data.validation=0 "
)
TRANSFORMER = (
    "optim.algorithm=adamw optim.schedule=cosine optim.weight_decay=0.1 optim.clip=1.0 "
    "model.layers=12 data.train.split=train "
)
RECURRENT = (
    "optim.algorithm=adam optim.schedule=cosine optim.lr=1e-3 optim.final_lr=1e-4 gamma=0.0 "
    "optim.batch_size=128 optim.betas=[0.9,0.999] optim.weight_decay=0.0 "
)
ON_CIFAR10 = f"data.name={CIFAR10} data.splits=[train,test] data.classes=10 "
ON_WIKITEXT = (
    f"data.train.name={WIKITEXT} data.train.config=wikitext-103-v1 data.train.split=train "
    f"data.test.name={WIKITEXT} data.test.config=wikitext-103-v1 data.test.split=validation "
    "data.length=256 "
)
OF_TEXT = RECURRENT + ON_WIKITEXT + "optim.steps=10000 optim.warmup_steps=1000 model.hidden=512 "
CHARACTERS = "data.tokenizer=characters data.vocabulary=210 model.layers=1 "
WORDS = "data.tokenizer=bpe data.vocabulary=16000 "
ROWS = {
    "resnet32_cifar10": RESNET + ON_CIFAR10 + "optim.epochs=200 model.depth=32 model.preact=true",
    "resnet110_cifar10": RESNET
    + ON_CIFAR10
    + "optim.epochs=200 model.depth=110 model.preact=false",
    "resnet56_imagenet32": RESNET + "optim.epochs=100 model.depth=56 model.preact=false "
    f"data.name={IMAGENET32} data.splits=[train,validation] data.classes=1000",
    "gpt2_wikitext103": TRANSFORMER + ON_WIKITEXT + WORDS + "optim.epochs=5.3 optim.lr=1e-3 "
    "optim.final_lr=1e-4 optim.batch_size=128 optim.warmup_steps=2000 optim.betas=[0.9,0.98] "
    "gamma=0.2 model.family=gpt2 model.hidden=256 model.length=256",
    "roberta_mnli": TRANSFORMER + "optim.epochs=2 optim.lr=3e-5 optim.final_lr=3e-6 "
    "optim.batch_size=32 optim.warmup_steps=2500 optim.betas=[0.9,0.999] gamma=0.8 "
    "model.pretrained=roberta-base model.hidden=768 model.length=128 data.tokenizer=roberta-base "
    f"data.length=128 data.train.name={GLUE} data.train.config=mnli data.test.name={GLUE} "
    f"data.test.config=mnli data.test.split={MATCHED}",
    "lstm_wikitext103_chars": OF_TEXT + CHARACTERS + "model.cell=lstm",
    "gru_wikitext103_chars": OF_TEXT + CHARACTERS + "model.cell=gru",
    "gru_wikitext103_words": OF_TEXT + WORDS + "model.cell=gru model.layers=3",
    "gru_cifar10_pixels": RECURRENT + ON_CIFAR10 + "optim.steps=2500 optim.warmup_steps=250 "
    "model.hidden=64 data.augment=false data.flip=true data.validation=0",
}
KEYS = sorted({argument.split("=")[0] for row in ROWS.values() for argument in row.split()})


def value_at(found, dotted: str):
    for key in dotted.split("."):
        found = None if found is None else found.get(key)
    return found


def settings(row: str) -> dict:
    given = OmegaConf.to_container(OmegaConf.from_dotlist(row.split()))
    return {key: value_at(given, key) for key in KEYS}


SETTINGS = {preset: settings(row) for preset, row in ROWS.items()}
PAPER = {row.preset: row for row in paper_rows().values()}  # what Table 2 prints
ROBERTA_TOKENS = dict(vocabulary=50_265, padding=1, labels=hub_layout.LABELS)  # its tokenizer's

IMAGES = ["optim.batch_size=4", "data.rows={train:12,test:4}"]
WITH_VALIDATION = ["optim.batch_size=4", "data.rows={train:12,validation:4}"]
BOOKS = ["optim.batch_size=2", "data.eval_limit=600", "data.train.rows=null"]
ROBERTA = [
    *("optim.batch_size=4", "data.train.rows=null"),
    *(f"{key}=${{data.root}}/roberta-base" for key in ("data.tokenizer", "model.pretrained")),
]
# Of each row: its model, and what makes its steps small.
LAUNCHES = {
    "resnet32_cifar10": ("resnet32_preact", IMAGES),
    "resnet110_cifar10": ("resnet110", IMAGES),
    "resnet56_imagenet32": ("resnet56", WITH_VALIDATION),
    "gpt2_wikitext103": ("gpt2", [*BOOKS, "model.hidden=32"]),
    "roberta_mnli": ("roberta", ROBERTA),
    "lstm_wikitext103_chars": ("lstm_char", BOOKS),
    "gru_wikitext103_chars": ("gru_char", BOOKS),
    "gru_wikitext103_words": ("gru_words", BOOKS),
    "gru_cifar10_pixels": ("gru_pixels", IMAGES),
}

each_preset = pytest.mark.parametrize("preset", SETTINGS)


@pytest.fixture
def shown(train):
    """The configuration that train.py would run, as ``--cfg job`` shows it."""

    def show(preset: str) -> DictConfig:
        asked = train("--cfg", "job", "--resolve", f"experiment={preset}")
        assert asked.code == 0, asked.err
        return OmegaConf.create(asked.out)

    return show


@each_preset
def test_a_preset_is_the_papers_row(shown, preset):
    cfg = OmegaConf.to_container(shown(preset))
    assert cfg["steps"] is None  # the recipe's
    assert {key: value_at(cfg, key) for key in KEYS} == SETTINGS[preset]


@each_preset
def test_a_presets_model_has_the_papers_sizes(shown, preset):
    cfg = shown(preset)
    recurrent = SETTINGS[preset]["optim.algorithm"] == "adam"
    given = {key: cfg.data[key] for key in ("classes", "vocabulary") if key in cfg.data}
    if "pretrained" in cfg.model:
        given = {"pretrained": None, **ROBERTA_TOKENS}  # that size, without the hub's weights
    with torch.device("cpu" if recurrent else "meta"):
        model = instantiate(cfg.model, **given)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    paper = PAPER[preset]
    # A chain of layers hands on its last state alone; one of time steps is as long as its input.
    assert (recurrent and predicts_at_every_step(model, cfg)) == paper.intermediate_losses
    assert hb.chain_length(model) == paper.L
    printed = paper.counted or paper.parameters
    zeros = len(str(printed)) - len(str(printed).rstrip("0"))
    assert round(trained, -zeros) == printed
    if "depth" in cfg.model:  # 16 -> 64
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert (convolutions[0].out_channels, convolutions[-1].out_channels) == (16, 64)


def predicts_at_every_step(model: nn.Module, cfg: DictConfig) -> bool:
    """One prediction, and so one loss, for each state of the chain, after a forward pass."""
    x = torch.zeros(1, 3, SIZE, SIZE)
    if "length" in cfg.data:
        x = torch.zeros(1, cfg.data.length, dtype=torch.int64)
    *predictions, _ = model(x).shape
    return math.prod(predictions) == hb.chain_length(model)


@pytest.mark.parametrize(
    ("preset", "steps", "warm_up"),
    [
        ("lstm_wikitext103_chars", 10_000, 1000),
        ("gru_cifar10_pixels", 2500, 250),
        ("roberta_mnli", 2 * (392_702 // 32), 2454),  # MNLI's pairs; printed as 2.5k
    ],
)
def test_the_warm_up_of_a_whole_run_is_as_printed(shown, preset, steps, warm_up):
    optim = shown(preset).optim
    rates = [learning_rate(step, steps, optim) for step in range(steps)]
    assert rates.index(max(rates)) + 1 == warm_up
    assert max(rates) == optim.lr and rates[-1] == pytest.approx(optim.lr / 10)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """What the nine rows read, in small."""
    root = tmp_path_factory.mktemp("hub")
    rows = {"train": 12, "test": 4}
    hub_layout.write_images(root, CIFAR10, "plain_text", ("img", "label"), 10, rows)
    rows |= {"validation": 4}
    hub_layout.write_images(root, IMAGENET32, "data", ("image", "label"), 1000, rows)
    hub_layout.write_text(root, WIKITEXT, "wikitext-103-v1", {"train": 60, "validation": 60})
    hub_layout.write_pairs(root, GLUE, "mnli", {"train": 24, MATCHED: 6})
    hub_layout.write_roberta(root / "roberta-base", layers=12, hidden=32, length=128)
    return root


@pytest.fixture
def offline(hub, tmp_path, monkeypatch) -> None:
    """The data in HIGHWAY_BP_DATA, and no connection to anywhere."""

    def refuse(_, address):
        raise AssertionError(f"asked {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HIGHWAY_BP_DATA", str(hub))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@each_preset
def test_each_row_is_launched_for_two_steps(train, runs, offline, preset):
    (model, small), paper = LAUNCHES[preset], PAPER[preset]
    launched = train(f"experiment={preset}", "steps=2", *small)
    assert launched.code == 0, launched.err
    row, records = row_of(only_run(runs)), records_of(only_run(runs))
    cfg = SETTINGS[preset]
    assert (row["experiment"], row["model"], row["metric"]) == (preset, model, paper.metric)
    assert row["data"] == (cfg["data.name"] or cfg["data.train.name"])
    assert (row["grad"], row["k"], row["gamma"]) == ("highway", 3, cfg["gamma"])
    assert (row["steps"], row["L"]) == (2, paper.L)
    assert [r["step"] for r in records if "eval_loss" in r][-1] == 2
    assert all(math.isfinite(row[key]) for key in ("train_loss", "eval_loss", paper.metric))
