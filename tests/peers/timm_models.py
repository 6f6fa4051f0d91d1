"""The smallest model of each of timm's files of architectures, on small images."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import models.torchvision_ops  # noqa: F401  before torchvision, which timm imports

import timm  # isort: skip

LARGEST = 100_000_000  # parameters; an architecture whose models are all larger is left out
SIDES = (64, 96, 128)  # of images, in pixels; the model's own comes last


def names() -> list[str]:
    """Takes a minute: all models are built, without memory."""
    files = (timm.list_models(module=file) for file in timm.list_modules())
    return [min(of_file, key=parameters) for of_file in files if of_file]


def parameters(name: str) -> float:
    """The number of parameters; infinite for a model that cannot be built without memory."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())
    return float("inf")


def build(name: str) -> nn.Module:
    """The model in float64, in evaluation mode, with random depth and weights that matter."""
    if (size := parameters(name)) > LARGEST:
        raise ValueError(f"{name} has {size} parameters; expected at most {LARGEST}")
    sides = ({"img_size": 64}, {"img_size": 96}, {})
    for side, depth in itertools.product(sides, ({"drop_path_rate": 0.1}, {})):
        torch.manual_seed(0)
        with contextlib.suppress(Exception):  # the architecture takes other arguments
            model = timm.create_model(name, num_classes=10, **side, **depth).double().eval()
            if any(_runs(model, batch) for batch in batches(model)):
                return _with_weights_that_matter(model)
    raise ValueError(f"{name} runs on no images")


def batches(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Images of several sizes."""
    channels, *_, own = model.default_cfg["input_size"]
    for side in (*SIDES, own):
        generator = torch.Generator().manual_seed(0)
        shape = 2, channels, side, side
        yield {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}


@torch.no_grad()
def _runs(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    with contextlib.suppress(Exception):
        return bool(model(**batch).isfinite().all())
    return False


@torch.no_grad()
def _with_weights_that_matter(model: nn.Module) -> nn.Module:
    """Many blocks begin with a scale of nearly 0, so that k = 0 would already be exact."""
    for p in model.parameters():
        if p.numel() and p.abs().max() < 1e-3:
            p.normal_(0, 0.5)
    return model
