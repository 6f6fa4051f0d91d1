"""Hooks and `retain_grad` on states: where they act, and what they leave of a gradient."""

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    Shows,
    assert_same,
    asserts_same,
    both_methods,
    gradients,
    made,
    refuses,
    rows,
)

# -- a last state that losses use inside its layer alone ------------------------------------------


class KeepsSize(Shows):
    """Keeps a loss on its state, and returns it too if asked."""

    def forward(self, h, returns=False):
        out = super().forward(h)
        self.size = out.square().mean()
        return (out, self.size) if returns else out


def look(h, by):
    h.register_hook(lambda g: g / 2) if by == "hook" else h.retain_grad()


@pytest.mark.parametrize("by", ["hook", "retain_grad"])
@refuses("which losses use by a tensor inside its layer alone", lambda: made(KeepsSize))
def test_a_look_at_a_last_state_in_a_loss_of_its_layer_is_refused(model, by):
    model()
    look(model.states[-1], by)
    sum(block.size for block in model.blocks).backward()


@asserts_same(made)
def test_hooks_on_states_that_are_dropped_and_that_no_loss_uses(model):
    h = model.emb(rows())
    for block in model.blocks:
        h = block(h)
        h.register_hook(lambda g: None)
    del h
    model.blocks[-1].seen.square().sum().backward()


@refuses("returns a tensor that it has computed from its state", lambda: made(KeepsSize))
def test_a_hook_on_a_last_state_in_a_returned_loss_is_refused(model):
    h, size = model.blocks[0](model.emb(rows()), returns=True)
    look(h, "hook")
    size.backward()


# -- states detached in place ---------------------------------------------------------------------


@pytest.mark.parametrize("before", ["freed", "kept", "none"])
@asserts_same(made, both=True)
def test_a_state_detached_in_place(model, before):
    loss, h = model(), model.states[-1]
    if before == "freed":
        loss.backward()
    elif before == "none":
        del loss
    h.detach_().requires_grad_()
    h.register_hook(lambda g: g / 2)
    model.head(h).sin().sum().backward()
    return [h.grad]


@asserts_same(made, both=True)
def test_states_with_hooks_that_are_written_into(model):
    h = model.emb(rows())
    for block in model.blocks:
        h = block(h)
        h.register_hook(lambda g: None)
        h += 0.1
    model.head(h).sin().sum().backward()


@refuses("was detached in place and has hooks", made)
def test_a_backward_pass_by_a_state_detached_in_place_with_a_hook_is_refused(model):
    h = model.blocks[0](model.emb(rows()))
    loss = h.sum()
    h.detach_().requires_grad_().register_hook(lambda g: g / 2)
    loss.backward()


# -- hooks that change the gradient of a state ----------------------------------------------------


def clip(g):
    return g / g.norm()


def clip_in_place(g):
    g /= g.norm()


HOOKED = [(EXACT, at) for at in range(4)] + [(IN_GROUPS, at) for at in (1, 3)]


@pytest.mark.parametrize("hook", [clip, clip_in_place, torch.nan_to_num])
@pytest.mark.parametrize(("method", "at"), HOOKED)
def test_little_is_left_of_a_large_gradient(method, at, hook):
    """Of one that is not a number, too. Two states have hooks; both are in the loss."""
    end = torch.nan if hook is torch.nan_to_num else 1.0

    def run(model):
        loss = 1e12 * model() + model.states[at].sum() + end * model.states[-1].sum()
        model.states[at].register_hook(hook)
        model.states[1].register_hook(clip)
        loss.backward()

    untouched, converted = made(), hb.convert(made(), method)
    for model in (untouched, converted):
        run(model)
    found, wanted = gradients(converted), gradients(untouched)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@both_methods
def test_a_hook_that_looks_changes_no_gradient(method):
    """Also below k = L."""
    shallow = hb.Highway(1, group_size=method.group_size)
    found = []
    for hooks in ([], [lambda g: None]):
        model = hb.convert(made(), shallow)
        loss = model()
        for hook in hooks:
            model.states[1].register_hook(hook)
        loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@both_methods
@pytest.mark.parametrize("at", range(4))
def test_a_hook_that_halves_the_gradient_of_a_state(method, at):
    def run(model):
        loss = model() + sum(h.sin().sum() for h in model.states)
        model.states[at].register_hook(lambda g: g / 2)
        model.states[0].register_hook(lambda g: 3 * g)
        loss.backward()

    assert_same(run, made, method)


class UsesPart(Shows):
    """Takes one of several arguments, so that each call shows its gradient."""

    def forward(self, h, parts, n):
        return h + parts[n] * self.g(self.inside(h))


def test_a_hook_leaves_what_lies_behind_it_alone():
    """Also the estimates of gamma of layers that are called twice."""
    found = []
    for hook in (lambda g: None, torch.clone):
        model = hb.convert(made(UsesPart), hb.Highway(1, gamma="auto"))
        torch.manual_seed(0)
        h, parts = model.emb(rows()), [torch.ones(6).double().requires_grad_() for _ in range(8)]
        for n in range(8):
            h = model.blocks[n % 4](h, parts, n)
            if n == 3:
                h.register_hook(hook)
        model.head(h).sin().sum().backward()
        found.append([part.grad for part in parts[4:]])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
