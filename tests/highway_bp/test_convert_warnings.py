"""Where a converted model runs plain backpropagation, one line says so."""

import warnings

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import Net, Shows, assert_same, backward, function, rows


class StateSecond(Shows):
    def forward(self, h):
        out = super().forward(h)
        return self.f(torch.tanh(h)), out


class Calls(Net):
    """Calls some of its layers, the first ones with gradients off."""

    def __init__(self, layer=Shows, frozen=0, called=4):
        super().__init__(layer)
        self.frozen, self.called = frozen, called

    def forward(self, x=None):
        h = self.emb(rows())
        for i, block in enumerate(self.blocks[: self.called]):
            with torch.set_grad_enabled(i >= self.frozen):
                h = block(h)
                h = h[1] if isinstance(h, tuple) else h
        return self.head(h).sum()


def told(model: nn.Module, passes: int) -> list[str]:
    """The lines that so many passes warn with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(passes):
            model().backward()
    return [str(w.message) for w in caught]


def converted(made: nn.Module) -> nn.Module:
    return hb.convert(made.double(), hb.Highway(0))


@pytest.mark.parametrize("setting", [{}, {"frozen": 1}, {"called": 3}])
def test_no_residual_path_in_the_layers_that_run(setting):
    (line,) = told(converted(Calls(StateSecond, **setting)), passes=3)
    assert line == (
        "no layer of blocks that was called has a residual path: they run as before, outside any "
        "chain"
    )


class PlainFirst(Shows):
    """The first one has no residual connection, and is called twice."""

    def forward(self, h):
        return super().forward(h) if self.number else torch.tanh(self.f(h))


def test_a_chain_behind_layers_without_one():
    class Twice(Calls):
        def forward(self, x=None):
            h = self.blocks[0](self.emb(rows()))
            for block in self.blocks:
                h = block(h)
            return self.head(h).sum()

    model = numbered(Twice(PlainFirst))
    assert told(converted(model), passes=3) == []
    assert hb.chain_length(model) == 3


@pytest.mark.filterwarnings("error")
def test_an_early_exit_shortens_no_chain():
    class Exits(Calls):
        def forward(self, x=None):
            h, ends = self.emb(rows()), []
            for block in self.blocks:
                h = block(h)
                ends.append(self.head(h).sum())
            return ends

    model = converted(Exits())
    for _ in range(3):
        model()[0].backward()
    model()[-1].backward()
    assert hb.chain_length(model) == next(iter(hb.chains(model))).longest == 4


class Halves(Shows):
    """Every other one has no residual connection."""

    def forward(self, h):
        return super().forward(h) if self.number % 2 else self.f(h)


def numbered(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        block.number = i
    return model


def test_chains_of_one_layer():
    lines = told(converted(numbered(Calls(Halves))), passes=3)
    assert lines == [
        "no chain of blocks has more than one layer: the gradient is that of backpropagation, "
        "whatever k"
    ]


def test_a_chain_of_two_layers_is_none_of_one():
    assert told(converted(Calls(called=2)), passes=3) == []
    assert told(converted(Calls(frozen=3)), passes=1) == []


def reversible(*ctx_state_and_blocks):
    *_, h, blocks = ctx_state_and_blocks
    for block in blocks:
        h = block(h)
    return h


@pytest.mark.parametrize("setup", [{}, {"setup_context": lambda ctx, inputs, output: None}])
def test_layers_within_a_function_of_its_own(setup):
    """Also in torch's newer form, in which the forward pass has no ctx."""

    class Runs(Net):
        def forward(self, x=None):
            run = function(reversible, lambda ctx, g: (g, None), **setup)
            return self.head(run(self.emb(rows()), self.blocks)).sum()

    model = converted(Runs())
    assert told(model, passes=2) == [
        "blocks.0 (Shows) runs inside a torch.autograd.Function, which computes its gradient "
        "itself: no chain"
    ]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(Net()).train()()


class LooksAtPairs(nn.Module):
    """Post-LN, with a norm of other tokens within: those of pairs of rows."""

    def __init__(self):
        super().__init__()
        self.f, self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, h):
        pairs = self.inner(h[:4].unflatten(0, (2, 2)).mean(1))
        return self.norm(h + torch.tanh(self.f(h)) @ pairs.T @ pairs)


def test_norms_of_other_tokens_are_no_part_of_the_carry():
    assert_same(backward, lambda: Net(LooksAtPairs).double())
