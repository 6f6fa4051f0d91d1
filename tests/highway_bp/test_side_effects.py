"""What a model does beside its passes: the gradient stays exact, or one line says why it cannot."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    Shows,
    asserts_same,
    backward,
    both_methods,
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


@both_methods
def test_a_network_that_has_diverged_has_nan_gradients(method):
    model = hb.convert(made(Shows), method)
    nn.init.constant_(model.blocks[1].g.weight, torch.inf)
    backward(model)
    assert model.emb.weight.grad.isnan().any()


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
