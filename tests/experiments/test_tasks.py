"""Scores by hand, optimisers, learning rates."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from experiments.optimizer import build_optimizer, learning_rate
from experiments.tasks import Classification, LanguageModelling


class Table(nn.Module):
    """Token v is followed by the logits in row v, whatever came before."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows).log())

    def forward(self, x):
        return self.rows[x]


TABLE = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3] * 3]
X, Y = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 1], [2, 1]])
NATS = -(math.log(0.5) + math.log(0.8) + math.log(1 / 3) + math.log(0.25)) / 4


def test_language_models_are_scored_per_token_and_per_character():
    task = LanguageModelling(characters_per_token=4.0)
    loss, extra = task.loss(Table(TABLE), X, Y)
    assert loss.item() == pytest.approx(NATS) and extra == {}
    batches = [(X[:1], Y[:1]), (X[1:], Y[1:])]
    scores = task.evaluate(Table(TABLE), batches)
    assert scores["eval_loss"] == pytest.approx(NATS)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(NATS))
    assert scores["eval_bits_per_char"] == pytest.approx(NATS / math.log(2) / 4)
    assert task.metric == "eval_perplexity"
    assert LanguageModelling(1.0).metric == "eval_bits_per_char"


def test_batches_of_different_size_count_by_their_targets():
    batches = [(X[0, :1], Y[0, :1]), (X[1], Y[1])]
    scores = Classification().evaluate(Table(TABLE), batches)
    wrong = -(math.log(0.5) + math.log(1 / 3) + math.log(0.25)) / 3
    assert scores["eval_loss"] == pytest.approx(wrong)
    assert scores["eval_accuracy"] == pytest.approx(1 / 3)  # 0 -> 0; the tie goes to 0


def test_a_hopeless_loss_has_a_perplexity_all_the_same():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1e4]).expand(*x.shape, 2)

    scores = LanguageModelling(1.0).evaluate(Sure(), [(X[:1], torch.zeros_like(X[:1]))])
    assert math.isfinite(scores["eval_perplexity"])


# learning rates


def cosine(step: int, total: int, lr: float, final_lr: float, warmup_steps: int) -> float:
    settings = {"lr": lr, "final_lr": final_lr, "warmup_steps": warmup_steps}
    return learning_rate(step, total, {"schedule": "cosine", **settings})


def test_cosine_warms_up_and_ends_at_a_tenth():
    rates = [cosine(t, 1000, 1e-3, 1e-4, 100) for t in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and rates[99] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    assert rates[549] == pytest.approx((1e-3 + 1e-4) / 2, rel=3e-3)
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a > b for a, b in pairwise(rates[100:]))


def test_a_shorter_run_warms_up_for_a_tenth():
    assert cosine(9, 100, 1.0, 0.1, 1000) == 1.0
    assert cosine(8, 100, 1.0, 0.1, 1000) == pytest.approx(0.9)
    assert [cosine(0, total, 1.0, 0.1, 1000) for total in (1, 2, 5)] == [1.0] * 3


def test_drops_divide_by_ten():
    optim = {"schedule": "drops", "lr": 1.0, "drops": [0.5, 0.75], "warmup_steps": 0}
    assert [learning_rate(t, 4, optim) for t in range(4)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


# optimisers

ADAM = dict(algorithm="adam", schedule="cosine", lr=0.1, final_lr=0.01, warmup_steps=0)
ADAM |= dict(weight_decay=0.0, betas=[0.9, 0.99])


def test_optimisers_leave_frozen_parameters_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, ADAM)
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert [p.shape for p in group["params"]] == [(2, 2)] and group["betas"] == (0.9, 0.99)
