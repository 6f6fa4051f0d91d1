"""What is trained and scored: image classification."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (a scalar with gradient) and the batch's accuracy."""
    logits = model(x).float()
    return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Cross-entropy and accuracy over all batches, in evaluation mode."""
    model.eval()
    total = correct = n = 0.0
    for x, y in batches:
        logits = model(x).float()
        total += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
        n += len(y)
    model.train()
    return {"eval_loss": total / n, "eval_accuracy": correct / n}
