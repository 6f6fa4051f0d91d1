"""Random models, losses and looks at gradients: the same as on the untouched model, or refused."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from tests.highway_bp.converted import assert_same

PROGRAMS = 100
METHODS = [hb.Highway(30), hb.Highway(30, group_size=2), hb.Highway(30, 0.4)]
METHODS += [hb.Highway(30, "auto"), hb.Highway(30, "auto"), hb.FixedPoint(30), hb.MGRIT(20)]
AFTER = {  # the residual connection
    "sum": lambda layer, h, z: h + z,
    "scaled": lambda layer, h, z: 0.7 * h + z,
    "relu": lambda layer, h, z: torch.relu(h + z),
    "norm": lambda layer, h, z: layer.norm(h + z),
}
BETWEEN = {  # what the model does between two layers; ``old`` is an earlier state
    "nothing": lambda h, old: h,
    "product": lambda h, old: 1.1 * h,
    "dropout": lambda h, old: F.dropout(h, 0.2),
    "skip": lambda h, old: h + old,
    "view": lambda h, old: h[:],
    "in place": lambda h, old: h.clone().mul_(0.9),
    "detach": lambda h, old: h.detach(),
    "back": lambda h, old: old,
}
LOSSES = {  # on a state, beside the loss at the end
    "none": lambda h, first: 0.0,
    "of a state": lambda h, first: h.sin().sum(),
    "of two states": lambda h, first: (h * first).mean(),
}
LOOKS = {  # at a state's gradient
    "none": lambda h, seen: None,
    "scales": lambda h, seen: h.register_hook(lambda g: g if g is None else 0.5 * g),
    "sees": lambda h, seen: h.register_hook(
        lambda g: None if g is None else seen.append(g.square().sum())
    ),
}


class Layer(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.f, self.g, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.after, self.rate = draw["after"], draw["dropout"]
        self.returns, self.skips = draw["returns"], draw["skips"]

    def forward(self, h, *given, written=None):
        z = self.g(torch.tanh(self.f(self.norm(h))))
        for t in given:
            z = z * torch.sigmoid(t)
        z = F.dropout(z, self.rate)
        self.kept = z.square().mean()
        out = h if self.skips and h.detach().sum() > 0 else AFTER[self.after](self, h, z)
        if written is not None:
            written.append(0.1 * z)
        return (out, z.mean(-1)) if self.returns == "extra" else out


class Program(nn.Module):
    """A model that calls its layers in an order, and with arguments, drawn by ``seed``."""

    def __init__(self, seed: int):
        super().__init__()
        r = self.random = random.Random(seed)
        draw = {
            "after": self.draw(AFTER),
            "dropout": r.choice([0.0, 0.0, 0.3]),
            "returns": r.choice(["state", "state", "extra"]),
            "skips": r.random() < 0.15,
        }
        n = r.randint(2, 5)
        self.emb, self.side, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList(Layer(draw) for _ in range(n))
        if r.random() < 0.2:
            self.layers[1].f.weight = self.layers[0].f.weight
        if r.random() < 0.3:
            self.layers[r.randrange(n)].requires_grad_(False)
        if r.random() < 0.15:
            self.emb.requires_grad_(False)
        order = list(range(n)) + [r.randrange(n) for _ in range(r.choice([0, 0, 2]))]
        if r.random() < 0.2:
            r.shuffle(order)
        self.given = r.choice(["nothing", "nothing", "side", "list"])
        self.checkpointed, self.keeps = r.random() < 0.15, r.random() < 0.25
        self.twice, self.asked = r.random() < 0.25, r.randint(1, 9)
        self.plan = [
            (i, *map(self.draw, (BETWEEN, LOSSES, {} if self.checkpointed else LOOKS)))
            for i in order
        ]

    def draw(self, kinds) -> str:
        """A key of ``kinds``, the first one more often."""
        names = list(kinds) or ["none"]
        return self.random.choice([names[0]] * len(names) + names)

    def forward(self, x):
        h, side, written, seen = self.emb(x), self.side(x), [], []
        given, named = ((side,) if self.given == "side" else ()), {}
        if self.given == "list":
            named["written"] = written
        first, states, loss = None, [h], 0.0
        for i, between, more, look in self.plan:
            layer = self.layers[i]
            if self.checkpointed:
                h = checkpoint(layer, h, *given, use_reentrant=False, **named)
            else:
                h = layer(h, *given, **named)
            if isinstance(h, tuple):
                h, extra = h
                loss = loss + extra.sin().mean()
            if self.keeps and not self.checkpointed:
                loss = loss + layer.kept
            first = h if first is None else first
            if h.requires_grad:
                LOOKS[look](h, seen)
            loss = loss + LOSSES[more](h, first)
            states.append(h)
            h = BETWEEN[between](h, states[len(states) // 2])
        return loss + self.head(h).square().sum() + sum(t.sum() for t in written), seen, states


def run(model):
    x = torch.arange(9).double().cos().view(3, 3).requires_grad_()
    loss, seen, _ = model(x)
    loss.backward(retain_graph=model.twice)
    if model.twice:
        (loss * loss).backward()
    shown = [x.grad, *(torch.stack(seen).sort().values if seen else ())]
    loss, _, states = model(x)
    h = states[model.asked % len(states)]
    asked = h if h.requires_grad and model.given != "list" else x
    return [*shown, *torch.autograd.grad(loss, asked, allow_unused=True)]


@pytest.mark.filterwarnings("ignore")
def test_random_programs():
    refused = 0
    for seed in range(PROGRAMS):
        torch.manual_seed(seed)
        model = Program(seed).double()
        method = METHODS[model.random.randrange(len(METHODS))]
        try:
            assert_same(run, lambda model=model: model, method, tolerance=1e-8)
        except RuntimeError as error:
            assert "expected" in str(error), f"program {seed} with {method}"
            refused += 1
        except AssertionError as error:
            raise AssertionError(f"program {seed} with {method}") from error
    assert refused < PROGRAMS / 10
