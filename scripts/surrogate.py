"""Made-up data of the shape that a preset trains on, and training steps on such data."""

from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import highway_bp as hb
from experiments.data.images import ImageData
from experiments.data.pairs import LABELS, PairData
from experiments.data.text import TextData
from experiments.identity import KINDS

Data = ImageData | TextData | PairData


def surrogate(data: DictConfig, rows: int = 2048) -> Data:
    """Random data in place of a configuration's: ``rows`` images, sequences or sentence pairs.

    Raises:
        ValueError: data of another kind.
    """
    kind, random = KINDS.get(data._target_), torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=random)

    if kind in ("images", "digits", "image_folder"):
        classes, size = data.get("classes", 10), data.get("size", 32)
        x, y = whole(256, rows, 3, size, size).to(torch.uint8), whole(classes, rows)
        middle = (0.5, 0.5, 0.5)
        return ImageData("surrogate", x, y, x, y, classes, middle, middle, False, False)
    if kind in ("text", "topics"):
        tokens = whole(data.vocabulary, rows * (data.length + 1)).to(torch.int16)
        return TextData("surrogate", tokens, tokens, data.vocabulary, data.length, len(tokens))
    if kind in ("pairs", "grammar"):
        pairs = torch.stack([whole(100, rows, data.length) + 2, whole(2, rows, data.length)], 1)
        y = whole(len(LABELS), rows)
        return PairData("surrogate", pairs.int(), y, pairs.int(), y, 50_265, 1)
    raise ValueError(f"data of kind {data._target_}; expected images, text or pairs")


Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, object]]


def one_pass(model: nn.Module, loss_of: Loss, x: Tensor, y: Tensor, amp: bool = False) -> Tensor:
    """Run forward and backward as in training; return the loss, ()."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp):
        loss, _ = loss_of(model, x, y)
    loss.backward()
    return loss.detach()


def training_step(
    model: nn.Module,
    passes: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    clip: float | None,
) -> Tensor:
    """Run a pass, clipping and optimiser as in training; return loss and gradient norm, (2,).

    ``passes(x, y)`` returns the loss and sets the gradients, for instance with `one_pass`.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = passes(*batch)
    norm = hb.total_norm(model)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    optimizer.step()
    return torch.stack([loss, norm])
