"""What converted layers are given, write and count: containers, lists, second runs; and states that
are no ordinary ones."""

import random
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    Net,
    Shows,
    assert_refused,
    assert_same,
    asserts_same,
    backward,
    looping,
    made,
    rows,
)


class Writes(Shows):
    """A loss into a list, and what the first layer has made into a dictionary, for all to read."""

    def forward(self, h, losses, shared):
        z = self.seen = self.inside(h)
        losses.append(z.square().mean())
        shared[0].setdefault("gate", self.scale * h)
        shared[0]["counted"] = 1 + shared[0].get("counted", 0)
        return h + shared[0]["gate"] * self.g(z)


class WithStores(Net):
    store = dict

    def given(self):
        return [], (self.store(),)

    def more(self, losses, shared):
        self.losses, self.shared = losses, shared[0]
        return 10 * sum(losses)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("method", "kind"), [(EXACT, dict), (IN_GROUPS, UserDict), (hb.FixedPoint(99), OrderedDict)]
)
def test_layers_that_write_into_lists_and_dictionaries(method, kind, again):
    """Once, also where a loss on what they keep makes them run again."""

    class WithStore(WithStores):
        store = kind

    def run(model):
        loss = model()
        if again:
            loss = loss + sum(block.seen.sum() for block in model.blocks)
        loss.backward()
        assert len(model.losses) == model.shared["counted"] == 4
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


class ReadOnly(dict):
    def __setitem__(self, key, value):
        raise TypeError("read-only")


class Kind(tuple):
    pass


def test_containers_of_arguments_stay_as_they_are():
    class Takes(Shows):
        def forward(self, h, settings, best, kind, pair):
            assert type(settings) is ReadOnly and type(kind) is Kind
            scale = settings["scale"] * best.values.mean() * kind[0] * pair.scale * pair.mask
            return h + scale * self.g(self.inside(h))

    def loop(blocks, h):
        best, kind = h.topk(2), Kind([h.mean(), 1.0])
        pair = Pair(torch.sigmoid(h), torch.ones(6).double())
        for block in blocks:
            h = block(h, ReadOnly(scale=2.0), best, kind, pair)
        return h

    model = assert_same(backward, looping(Takes, loop))
    (chain,) = hb.chains(model)
    assert chain.length == hb.iterations(model) == 4


class Multiplies(Shows):
    def forward(self, h, c):
        c.mul_(1.5)
        return super().forward(h + c)


class Adds(Shows):
    def forward(self, h, c):
        z = self.inside(h)
        c += z
        return h + self.g(z)


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


# -- a second run ---------------------------------------------------------------------------------


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


# -- states and hooks ----------------------------------------------------------------------------


class Queries(nn.Module):
    """q + f(memory), where q (1, 6) is broadcast to the batch by the first layer."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, q, memory):
        return q + torch.tanh(self.f(q) * memory)


class Decodes(Net):
    def __init__(self, layer=Queries):
        super().__init__(layer)
        self.query = nn.Parameter(torch.ones(1, 6))

    def forward(self, x):
        memory, h = self.emb(x), self.query
        for block in self.blocks:
            h = block(h, memory)
        return self.head(h).sin().sum()


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1)])
@asserts_same(lambda: made(Queries, Decodes))
def test_a_first_batch_of_another_size(model, sizes):
    for size in sizes:
        model(rows()[:size]).backward()


def test_a_nested_state_runs_outside_any_chain():
    def run(model):
        h = torch.nested.nested_tensor([rows()[:2], rows()], layout=torch.jagged)
        h = model.emb(h)
        for block in model.blocks:
            h = block(h)
        h.values().sin().sum().backward()

    with pytest.warns(UserWarning, match="does not get a floating tensor .that is not nested"):
        assert_same(run, made)


def test_a_backward_hook_of_all_modules_is_refused():
    hook = torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        assert_refused(made, "blocks.0 .* has a module backward hook")
    finally:
        hook.remove()
