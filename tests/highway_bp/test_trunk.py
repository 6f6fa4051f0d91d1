"""How `hb.convert` finds trunks, and what it says of them: also where it runs plain
backpropagation."""

import warnings

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp import converted
from tests.highway_bp.architectures import Plain, tanh
from tests.highway_bp.converted import Shows, assert_same, function, rows
from tests.highway_bp.families import build

K_1 = hb.Highway(1)


class Adds(Shows):
    """h + scale tanh(f(h))."""

    def forward(self, h, scale=1.0):
        return h + scale * self.inside(h)


class Halves(Shows):
    def forward(self, h):
        return h + 0.5 * self.inside(h)


class Maps(Shows):
    """No residual connection."""

    def forward(self, h):
        return self.inside(h)


class Decoys(nn.Module):
    """A stem and heads, which are lists of one class too, stand beside the layers."""

    def __init__(self, layers=3, scaled_by=1.0):
        super().__init__()
        self.stem = nn.ModuleList(Maps() for _ in range(2))
        self.blocks = nn.ModuleList(Adds() for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))
        self.scaled_by = scaled_by

    def forward(self, x):
        for layer in self.stem:
            x = layer(x)
        for i, block in enumerate(self.blocks):
            x = block(x, scale=1 + i)
            x = x if self.scaled_by == 1.0 else x * self.scaled_by
        return sum(head(x).square().sum() for head in self.heads)


def made(cls=Decoys, *given, **settings):
    torch.manual_seed(0)
    return cls(*given, **settings).double()


def in_front_of(*layers):
    """A linear layer, then these."""
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*layers)).double()


def backward(model):
    torch.manual_seed(1)
    model(torch.randn(3, 6).double()).square().sum().backward()


def gradients(model):
    backward(model)
    return list(converted.gradients(model).values())


def test_stems_and_heads_are_no_chains_and_the_report_says_so():
    model = hb.convert(made(), K_1)
    with pytest.warns(UserWarning, match="no layer of stem that was called has a residual path"):
        backward(model)
    shown = sorted(map(repr, hb.chains(model)))
    assert shown[0].startswith("Trunk(blocks: 3 x Adds, method=Highway(k=1")
    assert shown[1].startswith("Trunk(stem: 2 x Maps, 2 of them without a residual path")
    assert [chain.length for chain in hb.chains(model)] == [0, 3]


@pytest.mark.filterwarnings("ignore:no layer of stem")
@pytest.mark.parametrize("layers", ["blocks", "Adds", ["blocks"]])
def test_a_trunk_may_be_named(layers):
    model, whole = hb.convert(made(), K_1, layers=layers), made()
    assert [chain.name for chain in hb.chains(model)] == ["blocks"]
    torch.testing.assert_close(gradients(model), gradients(hb.convert(whole, K_1)))


@pytest.mark.filterwarnings("ignore:no layer of stem")
def test_an_operation_between_layers_breaks_the_chain_and_is_warned_of():
    with pytest.warns(UserWarning, match=r"blocks.1 \(Adds\) is not given the state that blocks.0"):
        assert_same(backward, lambda: made(scaled_by=1.1), K_1)  # chains of length 1


class Stage(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.down = nn.Linear(6, width)
        self.blocks = nn.Sequential(*(Adds() for _ in range(layers)))

    def forward(self, h):
        return self.blocks(torch.tanh(self.down(h)) if len(self.down.weight) == 6 else h)


def test_of_stages_the_layers_inside_are_the_trunks():
    """Beside a list of modules that may be missing."""

    class Staged(Decoys):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Stage(6 + i, 2 + i) for i in range(3))
            self.between = nn.ModuleList([None, None, None])

        def forward(self, x):
            for stage in self.blocks:
                x = stage(x)
            return x.square().sum()

    model = assert_same(backward, lambda: made(Staged), hb.Highway(9))
    names = [chain.name for chain in hb.chains(model)]
    assert names == ["stem", "blocks.0.blocks, blocks.1.blocks, blocks.2.blocks"]
    assert hb.chain_length(model) == hb.iterations(model) == 9  # from stage to stage


def test_layers_of_two_classes_in_turn_are_a_trunk():
    model = in_front_of(Adds(), Halves(), Halves(), Adds())
    model = assert_same(backward, lambda: model, hb.Highway(4))
    (chain,) = hb.chains(model)
    assert repr(chain).startswith("Trunk(1: 4 x Adds, Halves, method=")
    with pytest.raises(ValueError, match="found no list of layers"):
        hb.convert(in_front_of(Adds(), Adds(), Halves()), K_1)


class Activated(Shows):
    """a(S h + f(h)), S the identity or a linear shortcut."""

    def __init__(self, activation, shortcut):
        super().__init__()
        self.activation = activation
        self.shortcut = nn.Linear(6, 6, bias=False) if shortcut else nn.Identity()

    def forward(self, h):
        return self.activation(self.shortcut(h) + self.inside(h))


class Declares(Activated):
    def carry(self, h_in, h_out):
        with torch.enable_grad():
            h = (z := self.shortcut(h_in) + self.inside(h_in)).detach()
            slope = torch.autograd.grad(self.activation(h.requires_grad_()).sum(), h)[0]
        assert z.shape == slope.shape
        return hb.Diagonal(slope) @ hb.LinearMap(self.shortcut, h_in)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.1), nn.ELU()], ids=repr
)
def test_an_activation_after_the_sum_is_read_off_the_graph(activation, shortcut):
    found = in_front_of(*(Activated(activation, shortcut) for _ in range(4)))
    declared = in_front_of(*(Declares(activation, shortcut) for _ in range(4)))
    declared.load_state_dict(found.state_dict())
    hb.convert(found, K_1)
    declared[1] = hb.ResidualChain(declared[1], K_1)
    torch.testing.assert_close(gradients(found), gradients(declared))


@pytest.mark.parametrize(
    ("make", "arguments", "line"),
    [
        (lambda: 3, {}, "model is a int; expected an nn.Module"),
        (made, {"layers": []}, r"layers=\[\]; expected a name, or a list of names"),
        (made, {"method": 3}, "method=3; expected a gradient method"),
        (lambda: nn.Sequential(pairs()), {"layers": "0"}, "layers='0' holds lists of modules, wh"),
        (lambda: nn.Sequential(pairs()), {}, "found no list of layers in Sequential; expected a M"),
    ],
)
def test_what_cannot_be_converted(make, arguments, line):
    """The other lines of `hb.convert` are in tests/errors.md."""
    with pytest.raises((TypeError, ValueError), match=line):
        hb.convert(make(), **{"method": K_1, **arguments})


def pairs() -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleList([Maps(), Adds()]) for _ in range(3))


@pytest.mark.filterwarnings("ignore:no layer of stem")
def test_a_module_of_the_parent_used_inside_a_layer_is_refused_every_time():
    class Shares(Adds):
        def forward(self, h, scale=1.0):
            return super().forward(h, scale) + self.parents[0](h)

    model = made()
    outside = nn.Linear(6, 6).double()
    for block in model.blocks:
        block.__class__, block.parents = Shares, [outside]
    hb.convert(model, K_1, layers="blocks")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"blocks.0 \(Shares\) uses a tensor of shape"):
            backward(model)


@pytest.mark.parametrize("make", [nn.Sequential, lambda *ls: nn.Sequential(nn.Sequential(*ls))])
def test_a_model_that_is_a_list_of_small_layers(make):
    model = make(*(Plain(tanh(6)) for _ in range(4))).double()
    model = assert_same(backward, lambda: model, hb.Highway(4))
    (chain,) = hb.chains(model)
    assert chain.length == hb.iterations(model) == 4
    assert repr(chain).startswith("Trunk(Sequential: 4 x Plain" if make is nn.Sequential else "Tru")


def test_printing_a_model_shows_its_own_classes():
    text = str(hb.convert(build("gpt2"), K_1))
    assert "GPT2Block(" in text and "object at" not in text


def test_a_state_by_keyword_and_second_outputs():
    class Second(Adds):
        def forward(self, h, before=None):
            out = super().forward(h if before is None else h + 0.1 * torch.tanh(before))
            return out, torch.tanh(self.f(h))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Second() for _ in range(4))

        def forward(self, x):
            before = None
            for block in self.blocks:
                x, before = block(h=x, before=before)
            return x.square().sum() + before.square().sum()

    with pytest.warns(UserWarning, match="gets a tensor that requires a gradient"):
        assert_same(backward, lambda: made(Two), hb.Highway(9))


# -- where plain backpropagation runs -------------------------------------------------------------


class Calls(converted.Net):
    """Calls some of its layers, the first ones with gradients off; each knows its number."""

    def __init__(self, layer=Shows, frozen=0, called=4):
        super().__init__(layer)
        self.frozen, self.called = frozen, called
        for i, block in enumerate(self.blocks):
            block.number = i

    def forward(self, x=None):
        h = self.emb(rows())
        for i, block in enumerate(self.blocks[: self.called]):
            with torch.set_grad_enabled(i >= self.frozen):
                h = block(h)
                h = h[1] if isinstance(h, tuple) else h
        return self.head(h).sin().sum()


def told(model: nn.Module, passes: int) -> list[str]:
    """The lines that so many passes of the model, once converted, warn with."""
    hb.convert(model.double(), hb.Highway(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(passes):
            model().backward()
    return [str(w.message) for w in caught]


class StateSecond(Shows):
    def forward(self, h):
        out = super().forward(h)
        return self.f(torch.tanh(h)), out


class OtherStream(Shows):
    """Returns the other stream first, of another length."""

    def forward(self, h):
        other = self.norm(h[:2])
        return other + torch.tanh(self.f(other)) + h.mean(0), h


class EndsInNorm(Shows):
    def forward(self, h):
        return self.norm(torch.tanh(self.f(h)))


class Rectifies(Shows):
    """An activation after a product, which autograd records as Addmm: no sum with the state."""

    def forward(self, h):
        return torch.relu(self.f(h))


NO_PATH = (
    "no layer of blocks that was called has a residual path from the state that it is given to the "
    "first tensor that it returns: they run as before, outside any chain"
)


@pytest.mark.filterwarnings("ignore:no layer of blocks")
@pytest.mark.parametrize("setting", [{}, {"frozen": 1}, {"called": 3}])
@pytest.mark.parametrize("layer", [StateSecond, OtherStream, EndsInNorm, Rectifies])
def test_what_only_looks_like_a_residual_path_is_none(layer, setting):
    assert told(Calls(layer, **setting), passes=3) == [NO_PATH]
    assert_same(converted.backward, lambda: made(Calls, layer, **setting), K_1)


class PathLess(Shows):
    """Some have no residual connection."""

    without = (0,)

    def forward(self, h):
        return self.f(h).tanh() if self.number in self.without else super().forward(h)


def test_a_chain_behind_layers_without_one():
    class Twice(Calls):
        def forward(self, x=None):
            h = self.blocks[0](self.emb(rows()))
            for block in self.blocks:
                h = block(h)
            return self.head(h).sum()

    model = Twice(PathLess)
    assert told(model, passes=3) == []
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

    model = hb.convert(made(Exits), hb.Highway(0))
    for _ in range(3):
        model()[0].backward()
    model()[-1].backward()
    assert hb.chain_length(model) == next(iter(hb.chains(model))).longest == 4


def test_chains_of_one_layer():
    class EveryOther(PathLess):
        without = (0, 2)

    line = "no chain of blocks has more than one layer: the gradient is that of backpropagation, "
    assert told(Calls(EveryOther), passes=3) == [line + "whatever k"]
    assert told(Calls(called=2), passes=3) == []
    assert told(Calls(frozen=3), passes=1) == []


def reversible(*ctx_state_and_blocks):
    *_, h, blocks = ctx_state_and_blocks
    for block in blocks:
        h = block(h)
    return h


@pytest.mark.parametrize("setup", [{}, {"setup_context": lambda ctx, inputs, output: None}])
def test_layers_within_a_function_of_its_own(setup):
    """Also in torch's newer form, in which the forward pass has no ctx."""

    class Runs(converted.Net):
        def forward(self, x=None):
            run = function(reversible, lambda ctx, g: (g, None), **setup)
            return self.head(run(self.emb(rows()), self.blocks)).sum()

    line = "blocks.0 (Shows) runs inside a torch.autograd.Function, which computes its gradient "
    assert told(Runs(), passes=2) == [line + "itself: no chain"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        hb.convert(converted.made(), hb.Highway(0)).train()()
