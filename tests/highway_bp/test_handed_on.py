"""What a layer returns beside its state as it is: an argument, a parameter, a tensor of its own."""

import pytest
import torch
from torch import nn

from tests.highway_bp.converted import Net, Shows, asserts_same, backward, made, refuses, rows


class HandsOn(Shows):
    """Gives the next layer its second argument, which only the head uses."""

    def forward(self, h, c):
        return super().forward(h), c


class Computes(HandsOn):
    """The first layer computes what all others hand on."""

    def forward(self, h, c):
        return super().forward(h, self.scale * h if c is None else c)


class Carries(Net):
    def __init__(self, layer):
        super().__init__(layer)
        self.memory = nn.Linear(6, 6)

    def first(self):
        return self.memory(rows())

    def forward(self, x=None):
        h, c = self.emb(rows()), self.first()
        for block in self.blocks:
            h, c = block(h, c)
        return self.head(h * c).sin().sum()


class CarriesComputed(Carries):
    def first(self):
        return None


@asserts_same(lambda: made(HandsOn, Carries), both=True)
def test_an_argument_that_layers_hand_on(model):
    backward(model)


@asserts_same(lambda: made(Computes, CarriesComputed), both=True)
def test_a_result_that_later_layers_hand_on(model):
    backward(model)


class Weighs(Shows):
    """Returns a weight of the loss, which it does not use, in a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, h):
        return super().forward(h), [self.weight]


class SumsLosses(Net):
    def forward(self, x=None):
        h, loss = self.emb(rows()), 0.0
        for block in self.blocks:
            h, (weight,) = block(h)
            loss = loss + self.head(h).square().mean() * torch.exp(-weight) + weight
        return loss


@asserts_same(lambda: made(Weighs, SumsLosses), both=True)
def test_a_parameter_that_layers_return(model):
    backward(model)


@asserts_same(lambda: made(Weighs, SumsLosses), both=True)
def test_autograd_grad_of_a_parameter_that_layers_return(model):
    weights = [block.weight for block in model.blocks]
    backward(model)
    return torch.autograd.grad(model(), weights)


class ReturnsForeign(Weighs):
    held = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def forward(self, h):
        return super().forward(h)[0], [self.held]


@refuses(
    r"uses a tensor of shape \[\] that requires a gradient",
    lambda: made(ReturnsForeign, SumsLosses),
)
def test_a_foreign_tensor_that_layers_return_is_refused(model):
    backward(model)


class Perturbs(Shows):
    """Adds zeros of its own, and returns them for a look at their gradient."""

    def forward(self, h):
        d = torch.zeros_like(h, requires_grad=True)
        return super().forward(h) + d, d


@refuses("autograd alone has a part of the gradient", lambda: made(Perturbs))
def test_autograd_grad_of_zeros_that_a_layer_adds_is_refused(model):
    h, d = model.blocks[0](model.emb(rows()))
    torch.autograd.grad(model.head(h).sum() + d.sum(), d)


class Remembers(Shows):
    """The head uses what is handed on alone: no path leads from it to a state."""

    def forward(self, h, c):
        return super().forward(h), c * self.scale.sum()


class UsesMemory(Carries):
    def forward(self, x=None, hook=None):
        h, c = self.emb(rows()), self.first()
        for block in self.blocks[:3]:
            h, c = block(h, c)
            h.register_hook(hook)
        return self.blocks[3](h, c)[1].sin().sum()


def memory():
    return made(Remembers, UsesMemory)


@pytest.mark.parametrize("hook", [lambda g: None, lambda g: g / 2])
@asserts_same(memory, both=True)
def test_a_hook_on_a_state_that_no_loss_reaches(model, hook):
    model(hook=hook).backward()
    for p in model.parameters():  # zeros or None
        p.grad = p.grad if p.grad is not None and p.grad.any() else None


@asserts_same(memory, both=True)
def test_a_second_backward_pass_that_gives_such_a_state_nothing(model):
    h, c = model.blocks[0](model.emb(rows()), model.first())
    h.register_hook(lambda g: None)
    c.sin().sum().backward(retain_graph=True)
    model.blocks[1](h, c)[1].sin().sum().backward(retain_graph=True)
    c.sin().sum().backward()
    for p in model.parameters():  # zeros or None
        p.grad = p.grad if p.grad is not None and p.grad.any() else None


@pytest.mark.parametrize("hook", [lambda g: g / g.norm(), lambda g: (g.add_(1), None)[1]])
@refuses("which no path from a loss reaches, changes zeros", memory)
def test_a_hook_that_changes_the_zeros_of_such_a_state_is_refused(model, hook):
    model(hook=hook).backward()
