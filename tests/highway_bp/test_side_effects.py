"""What converted layers are given, write, count and keep, and what a model does beside its passes:
the gradient stays exact, or one line says why it cannot."""

import copy
import threading
import warnings
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call

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
    both_methods,
    looping,
    made,
    refuses,
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


# -- tensors inside layers ------------------------------------------------------------------------


class Keeps(Shows):
    """Keeps its input, and containers of what is inside, one of them for all layers."""

    def __init__(self):
        super().__init__()
        self.all_kept = []

    def forward(self, h):
        self.given, self.kept, self.named = h, [self.inside(h)], {"twice": 2 * h}
        self.all_kept.append(z := self.named["twice"].sin())
        return h + self.g(self.kept[0]) + z


@asserts_same(lambda: made(Keeps), both=True)
def test_retain_grad_of_what_hooks_are_given_and_lists_hold(model):
    seen, all_kept = [], []
    for block in model.blocks:
        block.all_kept = all_kept
        block.g.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        block.f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model()
    seen += [t for block in model.blocks for t in (block.kept[0], block.named["twice"])]
    seen += all_kept
    for t in seen:
        t.retain_grad()
    loss.backward()
    return [t.grad for t in seen]


@refuses(r"retain_grad on a tensor inside blocks.1", lambda: made(Keeps))
def test_retain_grad_of_a_kept_input_is_refused(model):
    loss = model()
    model.blocks[1].given.retain_grad()
    loss.backward()


# -- weights that are computed --------------------------------------------------------------------


@asserts_same(made)
def test_retain_grad_of_weights_that_are_computed(model):
    weights = {n: p.detach().clone().requires_grad_() * 1 for n, p in model.named_parameters()}
    for w in weights.values():
        w.retain_grad()
    functional_call(model, weights).backward()
    backward(model)
    return [w.grad for w in weights.values()]


@refuses("a weight of the chain is computed from another", made)
def test_a_weight_computed_from_another_is_refused(model):
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights["blocks.1.f.weight"] = 2 * weights["blocks.0.f.weight"]
    functional_call(model, weights).backward()


@both_methods
def test_a_network_that_has_diverged_has_nan_gradients(method):
    model = hb.convert(made(Shows), method)
    nn.init.constant_(model.blocks[1].g.weight, torch.inf)
    backward(model)
    assert model.emb.weight.grad.isnan().any()


@refuses("no gradient for a state inside a group", made, IN_GROUPS)
def test_a_hook_on_a_state_inside_a_group_that_no_solve_reaches_is_refused(model):
    h = model.blocks[0](model.emb(rows()))
    h.register_hook(lambda g: g / 2)
    model.blocks[1](h)
    model.blocks[1].seen.sum().backward()


def test_backward_passes_in_threads():
    """Over one model; they add to the same gradients, and each runs the parameters' hooks."""
    untouched = made()
    model, seen = hb.convert(copy.deepcopy(untouched), EXACT), [[], []]
    for each, calls in zip((untouched, model), seen, strict=True):
        for p in each.parameters():
            p.register_hook(lambda g, calls=calls: calls.append(g) or 2 * g)
        losses = [each(rows() * (1 + seed)) for seed in range(40)]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen[0]) == len(seen[1])
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class WithPositions(Shows):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 6))
        self.inner, self.more = (nn.Parameter(torch.zeros(n)) for n in ((1, 5, 6), (30,)))

    def forward(self, h):
        z = self.inside(h) + self.inner + self.more.view(1, 5, 6)
        return h + self.scale.exp() * self.g(z) + self.positions[None]


@pytest.mark.parametrize("method", [hb.Highway(0), hb.Highway(0, group_size=2), EXACT], ids=str)
def test_gradients_of_layers_share_no_memory(method):
    """Views of the same w (at k = 0) or of one gradient inside a layer; accumulation writes."""
    model = hb.convert(made(WithPositions), method)
    model(rows()[None]).backward()
    once = [p.grad.clone() for p in model.blocks.parameters()]
    model(rows()[None]).backward()
    for p, g in zip(model.blocks.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_two_converted_models_in_a_row_are_no_copies():
    first, second = hb.convert(made(), EXACT), hb.convert(made(), EXACT)
    h = first.emb(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in [*first.blocks, *second.blocks]:
            h = block(h)
    assert [chain.longest for model in (first, second) for chain in hb.chains(model)] == [4, 4]


def test_copies_of_a_converted_layer_are_told():
    model = hb.convert(made(), EXACT)
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(3))
    with pytest.warns(UserWarning, match="is a copy of a converted layer"):
        backward(model)
