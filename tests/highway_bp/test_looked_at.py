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
