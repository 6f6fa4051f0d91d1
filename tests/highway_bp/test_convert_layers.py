"""Layers of people's own making in a converted model: edits, adapters, copies, subclasses, patches,
parametrizations."""

import copy
import pickle
import random
import threading
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    TOKENS,
    Net,
    Shows,
    assert_same,
    asserts_same,
    backward,
    logits_loss,
    made,
    rows,
)
from tests.highway_bp.families import LAYERS, build, tf


class Scaled(nn.Module):
    """Stands around a layer, and is no layer of the chain."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.by = inner, nn.Parameter(torch.tensor(1.5).double())

    def forward(self, h):
        return self.by * self.inner(h)


@pytest.mark.parametrize("at", range(4))
@asserts_same(made)
def test_hooks_on_what_stands_between_two_chains_run_once(model, at):
    seen = []
    model.blocks[at] = Scaled(model.blocks[at])

    def hook(module, args, out):
        out.register_hook(lambda g: seen.append(g) or g * 0.5)

    model.blocks[at].register_forward_hook(hook)
    backward(model)
    return seen


@asserts_same()
def test_edits_in_a_loop_over_the_layers(model):
    torch.manual_seed(2)
    seen = []
    for layer in model.transformer.h:
        assert isinstance(layer, tf.models.gpt2.modeling_gpt2.GPT2Block)
        layer.mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).double()
        layer.attn.register_forward_hook(lambda _, __, out: seen.append(out[0].detach()))
    assert len(nn.ModuleList(model.transformer.h[:2])) == 2
    logits_loss(model).backward()
    assert len(seen) == LAYERS
    return seen


@asserts_same()
def test_layers_exchanged_and_tied(model):
    model.transformer.h[1] = model.transformer.h[0]
    model.transformer.h[2] = copy.deepcopy(model.transformer.h[0])
    model(**TOKENS, use_cache=False).loss.backward()


@pytest.mark.slow
def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            return peft.get_peft_model(model, config).double()

    def run(model):
        logits_loss(adapted(model)).backward()

    assert_same(run)
    assert_same(lambda model: logits_loss(model).backward(), lambda: adapted(build("gpt2")))


@asserts_same()
def test_a_frozen_bottom_is_left_out(model):
    for module in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
        module.requires_grad_(False)
    logits_loss(model).backward()


@asserts_same()
def test_freezing_between_forward_and_backward(model):
    loss = logits_loss(model)
    model.transformer.h[1].requires_grad_(False)
    loss.backward()


@asserts_same(made)
def test_a_shallow_copy_in_place_of_a_layer(model):
    model.blocks[1] = copy.copy(model.blocks[1])
    model().backward()


class Odd(nn.Module):
    """A head that returns no state: nothing of a chain."""

    def __init__(self, returns):
        super().__init__()
        self.norm, self.f, self.returns = nn.LayerNorm(6), nn.Linear(6, 6), returns

    def forward(self, *given, **named):
        (h,) = (*given, *named.values()) or (self.norm.weight,)
        return self.returns(self.f(self.norm(h)))


@pytest.mark.filterwarnings("ignore:no layer of heads")
@pytest.mark.parametrize("given", ["position", "name", "nothing"])
@pytest.mark.parametrize(
    "returns",
    [lambda z: (None, z), lambda z: (z.argmax(-1), z), lambda z: {0: "z", 1: z}],
    ids=["none", "integers", "text"],
)
def test_layers_that_return_no_state_run_as_before(returns, given):
    class WithHeads(Net):
        def __init__(self, layer):
            super().__init__(layer)
            self.heads = nn.ModuleList(Odd(returns) for _ in range(2))

        def forward(self):
            x = self.emb.weight.sin()
            args, kwargs = {"position": ([x], {}), "name": ([], {"x": x}), "nothing": ([], {})}[
                given
            ]
            return super().forward() + sum(head(*args, **kwargs)[1].sum() for head in self.heads)

    assert_same(backward, lambda: made(net=WithHeads))


@pytest.mark.parametrize("give", ["a dictionary", "a name that is not the first"])
def test_a_state_that_is_not_seen_is_warned_of(give):
    class Named(Shows):
        def forward(self, mask=None, h=None):
            if give == "a dictionary":
                return {"h": super().forward(mask["h"])}
            return super().forward(h)

    class Gives(Net):
        def forward(self, x=None):
            h = self.emb(rows())
            for block in self.blocks:
                h = block({"h": h})["h"] if give == "a dictionary" else block(h=h)
            return self.head(h).sum()

    with pytest.warns(
        UserWarning, match=r"blocks.0 \(Named\) does not get a floating tensor"
    ) as told:
        assert_same(backward, lambda: made(Named, Gives))
    assert len(told) == 1


# -- classes that do unusual things ---------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


class Locked(Shows):
    """Holds a lock, which cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class CopiesItself(Shows):
    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new


class ScaledShows(Shows):
    """Uses a weight of its own, for parametrizations of the layer itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def inside(self, h):
        return super().inside(h @ self.weight)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize(
    ("layer", "by"),
    [
        *((layer, by) for layer in (Locked, CopiesItself) for by in (copy.deepcopy, pickled)),
        (ScaledShows, copy.deepcopy),  # a parametrization of the layers themselves
    ],
)
def test_copies(layer, by):
    def run(model):
        for block in model.blocks:
            if layer is ScaledShows:
                weight_norm(block)
        again = by(model)
        backward(model)
        backward(again)
        return [p.grad for p in again.parameters()]

    assert_same(run, lambda: made(layer))


def derived(cls: type, factor: float) -> type:
    class Derived(cls):
        def forward(self, h):
            return super().forward(factor * h).cos()

    return Derived


def calls_itself(layer):
    """Sets a forward that calls the layer."""
    inner, calls = layer.forward, []

    def forward(h):
        calls.append(h)
        return (layer(h.sin()) * 1.1 if len(calls) % 3 else inner(h)) + h

    layer.forward = forward


def derives_itself(layer):
    class Recursive(type(layer)):
        calls = 0

        def forward(self, h):
            self.calls += 1
            return self(h.sin()) + h if self.calls % 3 else super().forward(h)

    layer.__class__ = Recursive


def wraps_in_a_hook(layer):
    """Sets a forward in the layer's next call."""

    def wrap(layer, args):
        inner = layer.forward
        layer.forward = lambda h: inner(h).cos() + h
        hook.remove()

    hook = layer.register_forward_pre_hook(wrap)


def replaced_inside(layer):
    inner = layer.forward

    def forward(h):
        with mock.patch.object(layer, "forward", lambda h: h.sin()):
            return layer(h) + inner(h)

    layer.forward = forward


INSIDE = {f.__name__: f for f in (calls_itself, derives_itself, wraps_in_a_hook, replaced_inside)}
ACTIONS = ["pass", "wrap", "wrap", "save", "put back", "delete", "replace", "derive", "copy"]
ACTIONS += INSIDE


@pytest.mark.parametrize("convert_at", range(4))
@pytest.mark.parametrize("seed", range(20))
def test_forwards_set_in_turn(seed, convert_at):
    """Forwards are wrapped, saved, put back, deleted, replaced and overridden by classes of the
    layer's own, with passes and copies in between."""

    def run(convert):
        choose, model, found = random.Random(seed), made(), []
        layer = model.blocks[1]
        saved = layer.forward
        for i in range(8):
            if i == convert_at:
                convert(model, EXACT, layers="blocks")
            action = choose.choice(ACTIONS)
            if action == "wrap":
                factor, inner = choose.random(), layer.forward
                layer.forward = lambda h, f=factor, inner=inner: inner(f * h).sin()
            elif action == "save":
                saved = layer.forward
            elif action == "put back":
                layer.forward = saved
            elif action == "delete" and "forward" in vars(layer):
                del layer.forward
            elif action == "replace":
                layer.forward = lambda h: 2 * h
            elif action == "derive":
                layer.__class__ = derived(type(layer), choose.random())
            elif action == "copy" and "forward" not in vars(layer) and not found:
                layer = model.blocks[1] = copy.deepcopy(layer)
                saved = layer.forward
            elif action == "pass":
                found.append(model())
            elif action in INSIDE:
                INSIDE[action](layer)
        found.append(model())
        sum(found).backward()
        with torch.no_grad():
            found.append(model())
        return [*found, *(p.grad for p in model.parameters())]

    torch.testing.assert_close(run(hb.convert), run(lambda *args, **kwargs: None))


class ByKeyword(Shows):
    def __call__(self, h):
        return super().__call__(h=h)


@pytest.mark.parametrize(
    "forward",
    [
        lambda own, **given: own(**{name: 2 * t for name, t in given.items()}),
        lambda own, other=None, h=None: own(2 * h if other is None else other),
    ],
)
@asserts_same(lambda: made(ByKeyword))
def test_a_state_given_by_keyword_reaches_any_forward_so(model, forward):
    model.blocks[1].forward = partial(forward, model.blocks[1].forward)
    backward(model)


class Registered(Shows):
    """Notes its subclasses, which have to be named, and makes layers of its own class."""

    known = []  # noqa: RUF012

    def __init_subclass__(cls, name: str):
        Registered.known.append(name)

    def another(self):
        new = type(self)().to(self.scale.dtype)
        new.load_state_dict(self.state_dict())
        return new


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
def test_a_class_that_notes_its_subclasses_and_makes_layers():
    def run(model):
        model.blocks.insert(2, model.blocks[0].another())
        backward(model)

    assert_same(run, lambda: made(Registered))
    assert Registered.known == []


def test_an_ordinary_layer_of_a_converted_class_is_no_chain():
    model = hb.convert(made(Registered), EXACT)
    assert len(hb.chains(model).__next__().layers) == 4
    model.blocks[0] = model.blocks[0].another()
    assert hb.chain_length(model) == 3
    again = hb.convert(nn.Sequential(model.blocks[0], model.blocks[0].another()), EXACT)
    assert hb.chain_length(again) == 2
