"""What layers are measured to take, and that the model is left as it was."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.hub_models import build


class Wide(nn.Module):
    """h + W2 W1 h / 10 over so many channels in between, with dropout and running statistics."""

    def __init__(self, inside: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(16), nn.Linear(16, inside), nn.Dropout(0.5), nn.Linear(inside, 16)
        )

    def forward(self, h):
        return h + 0.1 * self.body(h)


def model_of(*inside: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Wide(n) for n in inside]
    return nn.Sequential(nn.Linear(16, 16), hb.ResidualChain(layers, hb.Highway(1)))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(64 * 16).reshape(64, 16).sin()).square().mean()


def test_times_are_those_of_the_layers():
    seconds = hb.layer_seconds(model_of(4, 8000, 4, 2000), loss_of, repeats=5)
    assert seconds[1] > seconds[3] > max(seconds[0], seconds[2]) > 0
    assert hb.balanced_sizes(seconds, 2) == [2, 2]


def test_the_model_is_left_as_it_was():
    model = model_of(4, 4)
    loss_of(model).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    random = torch.get_rng_state()
    hb.layer_seconds(model, loss_of, repeats=1)
    assert torch.equal(torch.get_rng_state(), random)
    now = [*model.buffers(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(now, buffers + gradients, strict=True))
    assert model[1].method == hb.Highway(1) and "forward" not in vars(model[1])


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by one at every look: a forward and a backward pass take 1 each."""
    now = iter(range(10**6))
    monkeypatch.setattr("highway_bp.parallel.layer_seconds.clock_of", lambda model: now.__next__)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("gpt2", 2), ("llama", 2), ("roberta", 2), ("mamba", 1), ("resnet-basic", 1)],
)
def test_sublayers_add_up_to_the_layers_of_the_model(ticks, name, parts):
    case = build(name, 4)
    model = hb.convert(case.model, hb.Backprop())
    assert hb.layer_seconds(model, case.loss) == [2.0 * parts] * 4
    assert hb.current_method(model) == hb.Backprop()
    assert case.loss(model).isfinite()


def test_layers_that_no_gradient_reaches_have_no_backward_pass(ticks):
    model = model_of(4, 4, 4)
    for part in (model[0], model[1][0]):
        part.requires_grad_(False)
    assert hb.layer_seconds(model, loss_of) == [1.0, 2.0, 2.0]


def test_every_call_of_the_chain_counts(ticks):
    model = model_of(4, 4)
    twice = hb.layer_seconds(
        model, lambda m: sum(h.mean() for h in m[1](m[1](torch.ones(3, 16)), return_states=True))
    )
    assert twice == [3.0 + 1.0, 4.0]  # no gradient is wanted of the first call's input


@pytest.mark.parametrize(
    ("make", "loss", "line"),
    [
        (lambda: nn.Linear(2, 2), loss_of, "Linear holds no ResidualChain"),
        (
            lambda: nn.Sequential(*model_of(4), hb.GRU(16, 2)),
            loss_of,
            "Sequential has ResidualChain, GRU; expected one ResidualChain or converted trunk",
        ),
        (lambda: hb.GRU(16, 2), loss_of, "GRU has GRU; expected one ResidualChain"),
        (
            lambda: model_of(4),
            lambda m: m[0](torch.ones(2, 16)).sum(),
            "loss_fn did not run the model",
        ),
        (lambda: model_of(4), lambda m: m(torch.ones(2, 16)), "expected a scalar"),
    ],
)
def test_what_cannot_be_measured_is_told(make, loss, line):
    model = make()
    with pytest.raises(ValueError, match=line):
        hb.layer_seconds(model, loss)
    assert not any("forward" in vars(module) for module in model.modules())
