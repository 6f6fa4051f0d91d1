"""Gradients of what layers return, by hooks, `retain_grad` or `torch.autograd.grad`: in full, or
refused in one line."""

import io
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import highway_bp as hb
from highway_bp.recorded import recorded, recording
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    TOKENS,
    Net,
    Shows,
    assert_refused,
    assert_same,
    asserts_same,
    backward,
    both_methods,
    gradients,
    made,
    refuses,
    rows,
)
from tests.highway_bp.families import build, inputs


class WithExtras(Net):
    """Layers return (state, extra); the extras are in ``extras``, and all are in the loss."""

    def forward(self, x=None):
        h, self.states, self.extras = self.emb(torch.ones(5, 6).double()), [], []
        for block in self.blocks:
            h, extra = block(h, *self.extras[:1] * self.hands_on)
            self.states.append(h)
            self.extras.append(extra)
        return self.head(h).sin().sum() + sum(e.square().sum() for e in self.extras)

    hands_on = False


class HandsOn(WithExtras):
    """Every later layer gets the first layer's extra."""

    hands_on = True


class Bias(Shows):
    """An extra of the weights, which may come from an earlier layer."""

    def forward(self, h, bias=None):
        bias = self.scale.exp() if bias is None else bias
        return h + bias * self.g(self.inside(h)), bias


class AfterState(Shows):
    """An extra that is computed from the new state."""

    def forward(self, h):
        h = h + self.g(self.inside(h))
        return h, self.f(h).tanh()


class InnerChain(Shows):
    """An extra that comes from a chain inside the layer."""

    def __init__(self):
        super().__init__()
        self.chain = hb.ResidualChain([Shows(), Shows()], EXACT)

    def forward(self, h):
        z = self.chain(h)
        return h + self.g(z), z


class AfterStateByChain(InnerChain):
    """The same by way of a chain inside the layer."""

    def forward(self, h):
        h = h + self.g(self.inside(h))
        return h, self.chain(h)


class KeepsExit(Shows):
    """Keeps a tensor that is computed from the new state."""

    def forward(self, h):
        h = super().forward(h)
        self.exit = self.f(h)
        return h


def retained(model, of, **how):
    loss = model()
    looked_at = getattr(model, of)
    for t in looked_at:
        if t.grad_fn is not None:
            t.retain_grad()
    loss.backward(**how)
    return [t.grad for t in looked_at if t.grad_fn is not None]


@both_methods
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("layer", "net", "of"),
    [(Bias, HandsOn, "extras"), *((AfterState, WithExtras, of) for of in ("extras", "states"))],
)
def test_retain_grad_of_results(method, layer, net, of, keep):
    run = partial(retained, of=of, retain_graph=keep)
    assert_same(run, lambda: made(layer, net), method)


@asserts_same(lambda: build("t5"), both=True)
def test_retain_grad_inside_a_layer_whose_extra_later_layers_get(model):
    shown = []
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.register_forward_hook(
        lambda module, args, out: shown.append(out)
    )
    out = model(**inputs("t5"))
    shown[0].retain_grad()
    out.loss.backward()
    return [shown[0].grad]


@pytest.mark.parametrize("keep", [False, True])
@refuses(
    r"h.1 \(GPT2Block\) returned, which leads to a tensor inside the layer that a loss uses",
    lambda: build("gpt2"),
)
def test_retain_grad_of_attention_is_refused_where_a_loss_uses_what_follows_it(model, keep):
    shown = []
    model.transformer.h[1].attn.register_forward_hook(lambda *call: shown.append(call[2][0]))
    out = model(**TOKENS, output_attentions=True)
    out.attentions[1].retain_grad()
    (out.loss + shown[0].sum()).backward(retain_graph=keep)


@refuses(
    r"\(InnerChain\) returned, which comes from a chain inside the layer",
    lambda: made(InnerChain, WithExtras),
)
def test_retain_grad_of_an_extra_from_a_chain_inside_is_refused(model):
    retained(model, "extras")


class RecordsLeaf(Shows):
    """Records a tensor with a gradient of its own, as a hook of transformers would."""

    def __init__(self):
        super().__init__()
        self.leaf = torch.ones(6).double().requires_grad_()

    def forward(self, h):
        for found in recorded().values():
            found.append(self.leaf)
        return h + self.leaf * self.g(self.inside(h))


@refuses(r"uses a tensor of shape \[6\]", lambda: made(RecordsLeaf))
def test_a_recorded_leaf_that_is_no_parameter_is_refused(model):
    with recording(["leaves"]):
        model().backward()


class Inside(Shows):
    """An extra that the state depends on, as attention weights are."""

    def forward(self, h):
        z = self.inside(h)
        return h + self.g(z), z


class HoldsNothing(Shows):
    """Nothing, autograd's graph included, holds what ``g`` has returned."""

    def forward(self, h):
        return h + self.g(self.inside(h))


class Told(Shows):
    """Looks at its argument."""

    def forward(self, h, e):
        type(self).look(e)
        return h + self.g(self.inside(h + e))


class Tells(Net):
    def given(self):
        return (2 * self.emb(rows()),)


class Hard(Shows):
    is_residual = True

    def forward(self, h):
        return super().forward(h) if self.is_residual else self.g(self.inside(h))


@refuses(r"on a tensor inside blocks.1 \(HoldsNothing\)", lambda: made(HoldsNothing))
def test_a_hook_on_an_inner_tensor_that_nobody_holds_is_refused(model):
    """As those of pytorch-grad-cam."""

    def look(module, args, out):
        out.register_hook(lambda g: None)

    model.blocks[1].g.register_forward_hook(look)
    backward(model)


@pytest.mark.parametrize("look", ["retain_grad", "hook"])
def test_looks_by_a_hook_on_all_modules(look):
    """``retain_grad`` is completed; a hook would see parts."""

    def run(model):
        seen = []

        def note(module, args, out):
            if isinstance(module, nn.Linear):
                seen.append(out)
                out.retain_grad() if look == "retain_grad" else out.register_hook(lambda g: 2 * g)

        with register_module_forward_hook(note):
            backward(model)
        return [t.grad for t in seen]

    if look == "retain_grad":
        assert_same(run, lambda: made(HoldsNothing))
    else:
        assert_refused(lambda: made(HoldsNothing), "on a tensor inside blocks.0", run)


@pytest.mark.parametrize("look", [Tensor.retain_grad, lambda t: t.register_hook(lambda g: g / 2)])
@refuses(r"a hook or retain_grad on an argument of blocks.0 \(Told\)", lambda: made(Told, Tells))
def test_a_look_that_a_layer_takes_at_its_argument_is_refused(model, look):
    """The gradient leaves the chain elsewhere."""
    Told.look = staticmethod(look)
    backward(model)


@pytest.mark.parametrize("look", [Tensor.retain_grad, lambda t: t.register_hook(lambda g: g / 2)])
@refuses("no gradient for a state inside a group", lambda: made(Hard), IN_GROUPS)
def test_a_look_at_a_state_of_a_group_that_no_layer_of_the_chain_gets_is_refused(model, look):
    """Also at one that nobody holds any more, if by a hook."""
    model.blocks[1].is_residual = False
    loss = model()
    look(model.states[0])
    if look is not Tensor.retain_grad:
        del model.states[0]
    loss.backward()


@refuses(r"on a tensor inside blocks.2 \(Inside\)", lambda: made(Inside, WithExtras))
def test_a_hook_on_an_extra_that_nobody_holds_is_refused(model):
    loss = model() + model.extras[2].sum()
    model.extras[2].register_hook(lambda g: None)
    model.extras.clear()
    loss.backward()


def test_a_state_is_saved_without_a_warning():
    model = hb.convert(made(Inside, WithExtras), EXACT)
    model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.save(model.states, io.BytesIO())
    assert told == []


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


@asserts_same(made, both=True)
def test_a_second_run_in_inference_mode(model):
    loss = model() + sum(block.seen.sum() for block in model.blocks)
    with torch.inference_mode():
        loss.backward()


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
