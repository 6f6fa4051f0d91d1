"""Layers whose classes do unusual things: copies, subclasses, patches, parametrizations."""

import copy
import pickle
import random
import threading
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import highway_bp as hb
from tests.highway_bp.converted import EXACT, Shows, assert_same, asserts_same, backward, made


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
