"""What converted layers write, are given and count: in place, into lists, in second runs."""

import random
import warnings
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    Net,
    Shows,
    assert_refused,
    assert_same,
    backward,
    both_methods,
    looping,
    made,
    rows,
    seen_in_loss,
)


class Writes(Shows):
    """A loss into a list, and what the first layer has made into a dictionary, for all to read."""

    def forward(self, h, losses, shared):
        z = self.inside(h)
        losses.append(z.square().mean())
        shared[0].setdefault("gate", self.scale * h)
        shared[0]["counted"] = 1 + shared[0].get("counted", 0)
        return h + shared[0]["gate"] * self.g(z)


class WithStores(Net):
    store = dict

    def given(self):
        return [], (self.store(),)

    def more(self, losses, shared):
        self.counted, self.losses = shared[0]["counted"], len(losses)
        return 10 * sum(losses)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize(
    ("method", "kind"), [(EXACT, dict), (IN_GROUPS, UserDict), (hb.FixedPoint(99), OrderedDict)]
)
def test_layers_that_write_into_lists_and_dictionaries(method, kind):
    class WithStore(WithStores):
        store = kind

    def run(model):
        loss = model()
        loss.backward()
        assert model.counted == model.losses == 4
        return [loss]

    assert_same(run, lambda: made(Writes, WithStore), method)
    chain, losses, shared = hb.ResidualChain(made(Writes).blocks, method), [], (kind(),)
    h = rows().requires_grad_()
    exact = hb.ResidualChain(made(Writes).blocks)
    (chain(h, losses, shared).sum() + sum(losses)).backward()
    (exact(h, (others := []), ({},)).sum() + sum(others)).backward()
    assert len(losses) == 4 and shared[0]["counted"] == 4
    for p, q in zip(chain.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Pair(NamedTuple):
    scale: torch.Tensor
    mask: torch.Tensor


def test_arguments_in_a_named_tuple():
    class Scales(Shows):
        def forward(self, h, pair):
            return h + pair.scale * pair.mask * self.g(self.inside(h))

    class GivesPair(Net):
        def given(self):
            return (Pair(torch.sigmoid(self.emb(rows())), torch.ones(6).double()),)

    model = assert_same(backward, lambda: made(Scales, GivesPair))
    (chain,) = hb.chains(model)
    assert chain.length == hb.iterations(model) == 4


def test_what_was_written_is_there_once_when_a_layer_has_to_run_again():
    class Both(WithStores):
        def forward(self, x=None):
            loss = super().forward(x)
            return loss + sum(block.seen.sum() for block in self.blocks)

    class Keeps(Writes):
        def inside(self, h):
            self.seen = super().inside(h)
            return self.seen

    def run(model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a new chain begins there")
            model().backward()
        assert model.counted == model.losses == 4

    assert_same(run, lambda: made(Keeps, Both))


class Multiplies(Shows):
    def forward(self, h, c):
        c.mul_(1.5)
        return super().forward(h + c)


class Adds(Shows):
    def forward(self, h, c):
        z = self.inside(h)
        c += z
        return h + self.g(z)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@both_methods
@pytest.mark.parametrize("by", ["a product", "a copy", "a part"])
def test_an_argument_that_the_model_changes_between_two_layers(by, method):
    class Scales(Shows):
        def forward(self, h, c):
            return h + c.sigmoid() * self.g(self.inside(h))

    class Changes(Net):
        def forward(self, x=None):
            h, c = self.emb(rows()), torch.tanh(self.emb(rows())) * 1.0
            for i, block in enumerate(self.blocks):
                h = block(h, c)
                if i == 1 and by == "a product":
                    c.mul_(h + 1.0)
                elif i == 1 and by == "a copy":
                    c.copy_(h.tanh())
                elif by == "a part":
                    c[i] = h[i].tanh()
            return self.head(h).sin().sum()

    assert_same(backward, lambda: made(Scales, Changes), method)


@pytest.mark.parametrize("layer", [Multiplies, Adds])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_an_argument_changed_in_place(layer, wants_gradient):
    class Given(Net):
        def given(self):
            return (torch.tanh(self.emb(rows())) if wants_gradient else torch.zeros(5, 6).double(),)

        def more(self, c):
            return c.sum()

    if layer is Multiplies and not wants_gradient:
        assert_same(backward, lambda: made(layer, Given))
    else:
        told = r"blocks.0 \(\w+\) changes an argument in place, whose"
        assert_refused(lambda: made(layer, Given), told)


# -- memory that outputs share --------------------------------------------------------------------


class WithView(Shows):
    def forward(self, h):
        out = super().forward(h)
        return out, out[:, 0]


class MaySkip(Shows):
    skips = False

    def forward(self, h):
        return h if self.skips else super().forward(h)


def doubles_views(blocks, h):
    for block in blocks:
        h, first = block(h)
        first.mul_(2)
    return h


def reads_views_after(blocks, h):
    total = 0.0
    for block in blocks:
        h, first = block(h)
        h += 1
        total = total + first.sum()
    return h + total


def writes_into_a_skipped_state(blocks, h):
    states = []
    for i, block in enumerate(blocks):
        block.skips = i == 2
        h = block(h)
        h = h.add_(1) if block.skips else h
        states.append(h)
    return sum(states)


@pytest.mark.parametrize("loop", [doubles_views, reads_views_after])
def test_writing_into_shared_memory_is_refused(loop):
    assert_refused(looping(WithView, loop), "returned tensors that share memory")


@both_methods
def test_a_skipped_layer_returns_its_input_itself(method):
    with pytest.warns(UserWarning, match="a new chain begins there"):
        assert_same(backward, looping(MaySkip, writes_into_a_skipped_state), method)


# -- a second run ---------------------------------------------------------------------------------


def test_a_second_run_where_the_state_was_changed_is_refused():
    def loop(blocks, h):
        for block in blocks:
            h = block(h)
            with torch.no_grad():
                h.clamp_(-2, 2)
        return h

    assert_refused(
        looping(Shows, loop), "what it returned was changed in place since", seen_in_loss
    )


def test_a_counter_changed_in_place_by_a_layer_that_has_to_run_again_is_refused():
    class Counts(Shows):
        def forward(self, h, count):
            count += 1
            return super().forward(h)

    class Counted(Net):
        def given(self):
            return (torch.zeros(()),)

        def more(self, count):
            assert count == 4
            return sum(block.seen.sum() for block in self.blocks)

    def make():
        return made(Counts, Counted)

    assert_refused(make, "changes an argument in place; expected backward")
    assert_same(lambda model: model().backward(retain_graph=True), make)


def test_a_second_run_that_returns_something_else_beside_the_state_is_refused():
    class Noisy(Shows):
        def forward(self, h):
            return super().forward(h), random.random() * self.seen.sum()

    class Beside(Net):
        def forward(self, x=None):
            h, more = self.emb(rows()), 0.0
            for block in self.blocks:
                h, extra = block(h)
                more = more + extra + block.seen.sum()
            return self.head(h).sum() + more

    assert_refused(
        lambda: made(Noisy, Beside), "has to be run once more for its gradient, but gave other"
    )


def test_a_buffer_that_is_assigned_anew_counts_one_run():
    class Assigns(Shows):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, h):
            self.steps = self.steps + 1
            return super().forward(h)

    def run(model):
        (model() + sum(block.seen.sum() for block in model.blocks)).backward()
        return [block.steps for block in model.blocks]

    assert_same(run, lambda: made(Assigns))
