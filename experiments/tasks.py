"""The loss and the scores of each task: classification, language modelling."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Iterable[tuple[Tensor, Tensor]]


class Classification:
    """Cross-entropy of logits (B, C) and labels y (B,)."""

    metric: ClassVar[str] = "eval_accuracy"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss, a scalar with a gradient, and further training scores."""
        logits = model(x).float()
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), {"train_accuracy": accuracy}

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Return scores over all batches; ``metric`` names the one that stands for a run."""
        loss, correct = _mean_per_target(model, batches)
        return {"eval_loss": loss, "eval_accuracy": correct}


@dataclass(frozen=True)
class LanguageModelling:
    """Cross-entropy of logits (B, L, V) and next tokens y (B, L), in nats per token.

    characters_per_token: of the test text; it is 1 for a model of characters. That model is scored
    in bits per character, all others in perplexity per token.
    """

    characters_per_token: float

    @property
    def metric(self) -> str:
        return "eval_bits_per_char" if self.characters_per_token == 1 else "eval_perplexity"

    def loss(self, model, x, y):
        logits = model(x).float()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()), {}

    def evaluate(self, model, batches):
        loss, _ = _mean_per_target(model, batches)
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),  # exp of more overflows a float
            "eval_bits_per_char": loss / math.log(2) / self.characters_per_token,
        }


Task = Classification | LanguageModelling


@torch.no_grad()
def _mean_per_target(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Cross-entropy and share of right answers, over all targets of all batches."""
    model.eval()
    sums, n = 0, 0
    for x, y in batches:
        logits = model(x).float().flatten(0, -2)
        loss = F.cross_entropy(logits, y.flatten(), reduction="sum")
        correct = (logits.argmax(-1) == y.flatten()).sum()
        sums = sums + torch.stack([loss.double(), correct.double()])
        n += y.numel()
    model.train()
    total, correct = sums.tolist()
    return total / n, correct / n
