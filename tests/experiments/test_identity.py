"""What a run's hash depends on, and that the hashes of all presets last."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from experiments.config import CONFIGS, composed
from experiments.data.images import ImageData
from experiments.data.pairs import LABELS, PairData
from experiments.data.text import TextData
from experiments.identity import KINDS, config_hash, identity, precision_of, setup_hash

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "golden_presets.json").read_text())
PRESETS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))


def hash_of(cfg, device: str = "cpu") -> str:
    return config_hash(identity(cfg, device))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_presets_hashes_are_what_they_were(preset):
    cfg = composed(f"experiment={preset}")
    found = {device: hash_of(cfg, device) for device in ("cpu", "cuda")}
    assert found == GOLDEN[preset]["hash"]


def test_no_two_presets_are_one_run():
    hashes = [golden["hash"]["cpu"] for golden in GOLDEN.values()]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("preset", [p for p in PRESETS if "resnet50" not in p])
def test_every_presets_weights_and_batches_are_what_they_were(preset):
    """Weights from seed 0, and batches 0 and 1000 of surrogate data of the real number of rows."""
    cfg = composed(f"experiment={preset}")
    data = surrogate(cfg.data)
    golden = GOLDEN[preset]
    torch.manual_seed(0)
    pretrained = {"pretrained": None} if cfg.model.get("pretrained") else {}
    if golden["weights"] is not None:
        weights = instantiate(cfg.model, **data.model_arguments(), **pretrained)
        assert weight_sum(weights) == pytest.approx(golden["weights"], rel=1e-6)
    batches = data.train_batches(cfg.optim.batch_size, 0, "cpu")
    for step in (0, 1000):
        assert digest(batches.batch(step)) == golden[f"batch_{step}"]


def surrogate(data):
    """Data of the shape that ``data`` configures, each value told by its row."""
    kind = KINDS[data._target_]
    if kind in ("images", "digits"):
        n, classes = (1437, 10) if kind == "digits" else (data.rows.train, data.classes)
        n = min(n, 50_000)  # of ImageNet32's 1.3 million
        x = torch.arange(n * 27, dtype=torch.int64).mul_(7919).remainder_(251)
        x = x.to(torch.uint8).view(n, 3, 3, 3)
        y = torch.arange(n) % classes
        mean, flip = (0.5, 0.4, 0.3), kind == "images" and data.flip
        return ImageData("surrogate", x, y, x, y, classes, mean, mean, data.augment, flip)
    if kind in ("text", "topics"):
        tokens = torch.arange(2_000_000).mul_(31).remainder_(min(data.vocabulary, 30_000))
        tokens = tokens.short()
        return TextData("surrogate", tokens, tokens, data.vocabulary, data.length, len(tokens))
    rows = torch.arange(8000 * 2 * 9).remainder_(50).add_(2).view(8000, 2, 9).int()
    labels = torch.arange(8000) % len(LABELS)
    return PairData("surrogate", rows, labels, rows, labels, 100, 1)


def weight_sum(model: torch.nn.Module) -> float:
    """Told apart by order as well, and the same on every processor but for rounding."""
    sums = [p.detach().double().abs().sum() * (1 + i) for i, p in enumerate(model.parameters())]
    return sum(sums).item()


def digest(batch: tuple[torch.Tensor, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in batch)).hexdigest()[:8]


def test_every_class_that_a_configuration_names_has_a_lasting_name():
    for group in ("model", "data", "grad", "schedule"):
        for file in (CONFIGS / group).glob("*.yaml"):
            assert composed(f"{group}={file.stem}")[group]._target_ in KINDS
    assert len(set(KINDS.values())) == len(KINDS)


SAME = [
    *("seed=3", "device=cpu", "run_root=elsewhere", "data.root=elsewhere"),
    *("data.cache_dir=elsewhere", "trainer.threads=1", "trainer.eval_interval=7"),
    *("trainer.snapshots=[3]", "trainer.deterministic=true", "trainer.cuda_graph=true"),
    *("logger=none", "diagnostics=figure6", "advise=true"),
    *("optim.lr=1e-1", "optim.epochs=200.0"),  # the same numbers
    "trainer.amp=false",  # what auto is on a CPU
]
OTHER = [
    *("k=2", "gamma=0.2", "grad=bp", "grad.group_size=3", "grad.tolerance=0.1"),
    *("schedule=linear", "model.depth=44", "model.downsampling=irevnet", "data.augment=false"),
    *("data.validation=5000", "optim.epochs=20", "optim.lr=0.05", "optim.weight_decay=0"),
    *("optim.batch_size=64", "optim.clip=1.0", "steps=390", "trainer.amp=true"),
    "trainer.channels_last=false",
]


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_what_changes_the_result_and_nothing_else_is_another_run(change):
    base = composed("experiment=resnet32_cifar10")
    changed = composed("experiment=resnet32_cifar10", change)
    assert (hash_of(changed) == hash_of(base)) == (change in SAME)


def test_steps_are_one_thing_however_they_are_given():
    asked = ("steps=100", "optim.steps=100")
    one, other = (hash_of(composed("experiment=resnet32_cifar10", a)) for a in asked)
    assert one == other


def test_method_and_schedule_are_no_part_of_the_setup():
    def setup(*overrides: str) -> str:
        return setup_hash(identity(composed("experiment=resnet32_cifar10", *overrides), "cpu"))

    assert setup("grad=bp") == setup("k=0") == setup("schedule=linear") == setup("grad=mgrit")
    assert setup("optim.lr=0.05") != setup() != setup("trainer.amp=true")


@pytest.mark.parametrize(
    ("amp", "tf32", "device", "precision"),
    [
        ("auto", False, "cpu", "float32"),
        ("auto", False, "cuda", "bfloat16"),
        (True, False, "cpu", "bfloat16"),
        (False, True, "cuda", "tf32"),
        (False, True, "cpu", "float32"),
        (False, False, "cuda", "float32"),
    ],
)
def test_precision_is_told_as_it_is(amp, tf32, device, precision):
    assert precision_of({"amp": amp, "tf32": tf32}, device) == precision


def test_a_class_of_the_users_own_is_its_own_name():
    cfg = composed("experiment=digits", "model._target_=mine.Net", "+model.width=3")
    fields = identity(cfg, "cpu")
    assert fields["model"] == "mine.Net" and fields["model.width"] == 3
