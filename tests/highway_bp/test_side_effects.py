"""What a model does beside its passes: the gradient stays exact, or one line says why it cannot."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import highway_bp as hb
from tests.highway_bp.architectures import PlainSplit
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    Net,
    Shows,
    add_loss,
    assert_refused,
    assert_same,
    asserts_same,
    backward,
    both_methods,
    function,
    made,
    refuses,
    rows,
)

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


# -- functions between layers, and with a gradient of their own -----------------------------------


def test_losses_added_in_front():
    """A custom function behind the chain adds to the gradients of the chain's own weights."""

    class Front(Net):
        def forward(self, x=None):
            penalty = sum(p.square().sum() for p in self.blocks.parameters())
            h = add_loss(self.emb(rows()), penalty)
            for block in self.blocks:
                h = block(h)
            return self.head(h).sin().sum()

    assert_same(backward, lambda: made(net=Front))


class AddsInside(Shows):
    weight = 1.0  # of the added loss

    def forward(self, h):
        z = self.inside(h)
        return h + add_loss(self.g(z), self.weight * z.square().mean())


def states(model):
    loss, h = 0.0, model.emb(rows())
    for block in model.blocks:
        h = block(h)
        loss = loss + h.square().sum()
    loss.backward()


def test_losses_added_inside_layers():
    """Exact with losses on states, but not where two products go through one graph."""
    assert_same(states, lambda: made(AddsInside))
    for method in (IN_GROUPS, hb.MGRIT(4, 2)):
        assert_refused(
            lambda: made(AddsInside), "adds to the gradient in its backward", states, method
        )

    def from_the_second_step_on(model):
        for block in model.blocks:
            block.weight = 0.0
        states(model)
        for block in model.blocks:
            block.weight = 1.0
        states(model)

    assert_refused(
        lambda: made(AddsInside), "adds to the gradient", from_the_second_step_on, IN_GROUPS
    )


@both_methods
def test_a_network_that_has_diverged_has_nan_gradients(method):
    model = hb.convert(made(Shows), method)
    torch.nn.init.constant_(model.blocks[1].g.weight, torch.inf)
    states(model)
    assert model.emb.weight.grad.isnan().any()


def test_gradients_written_by_a_backward_pass_are_refused():
    class Accumulates(Shows):
        def __init__(self):
            super().__init__()
            self.g.weight.main_grad = torch.zeros(6, 6).double()

        def forward(self, h):
            x, weight = self.inside(h), self.g.weight

            def backward(ctx, g):
                weight.main_grad += g.T @ x.detach()
                return g @ weight.detach()

            return h + function(lambda ctx, x: x @ weight.detach().T, backward)(x)

    assert_refused(lambda: made(Accumulates), "writes the gradients of parameters itself")


def test_a_gradient_that_a_function_keeps_is_not_written_into():
    class Constant(PlainSplit):
        def g(self, h):
            kept = torch.full_like(h, 0.3)
            return function(lambda ctx, h: 0.3 * h, lambda ctx, w: kept)(h)

    chain, x = (
        hb.ResidualChain([Constant(nn.Linear(6, 6)) for _ in range(4)]),
        rows().requires_grad_(),
    )
    found = []
    for method in (hb.Backprop(), EXACT):
        chain.method = method
        found += torch.autograd.grad(chain(x).square().sum(), x)
    torch.testing.assert_close(*found)


# -- states inside groups -------------------------------------------------------------------------


@refuses("no gradient for a state inside a group", made, IN_GROUPS)
def test_a_hook_on_a_state_inside_a_group_that_no_solve_reaches_is_refused(model):
    h = model.blocks[0](model.emb(rows()))
    h.register_hook(lambda g: g / 2)
    model.blocks[1](h)
    model.blocks[1].seen.sum().backward()


def test_backward_passes_in_threads():
    """Over one model; they add to the same gradients."""
    untouched = made()
    model, seeds = hb.convert(copy.deepcopy(untouched), EXACT), range(4)
    for each in (untouched, model):
        losses = [each(rows() * (1 + seed)) for seed in seeds]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_two_converted_models_in_a_row_are_no_copies():
    first, second = hb.convert(made(), EXACT), hb.convert(made(), EXACT)
    h = first.emb(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in [*first.blocks, *second.blocks]:
            h = block(h)
    assert [chain.longest for model in (first, second) for chain in hb.chains(model)] == [4, 4]


# -- copies, containers ---------------------------------------------------------------------------


def test_copies_of_a_converted_layer_are_told():
    model = hb.convert(made(), EXACT)
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(3))
    with pytest.warns(UserWarning, match="is a copy of a converted layer"):
        backward(model)
