"""`retain_grad` and hooks on what layers return: the whole gradient, or a refusal in one line."""

import pytest
import torch

import highway_bp as hb
from highway_bp.recorded import recorded, recording
from tests.highway_bp.converted import (
    EXACT,
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


def retained(model, of, **how):
    loss = model()
    looked_at = getattr(model, of)
    for t in looked_at:
        if t.grad_fn is not None:
            t.retain_grad()
    loss.backward(**how)
    return [t.grad for t in looked_at if t.grad_fn is not None]


@pytest.mark.parametrize("keep", [False, True])
@asserts_same(lambda: made(Bias, HandsOn), both=True)
def test_retain_grad_of_an_extra_that_later_layers_get(model, keep):
    return retained(model, "extras", retain_graph=keep)


@both_methods
@pytest.mark.parametrize("of", ["extras", "states"])
def test_retain_grad_beside_extras_computed_from_the_state(method, of):
    assert_same(lambda model: retained(model, of), lambda: made(AfterState, WithExtras), method)


class AfterStateByChain(InnerChain):
    """The same by way of a chain inside the layer."""

    def forward(self, h):
        h = h + self.g(self.inside(h))
        return h, self.chain(h)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("layer", [AfterState, AfterStateByChain])
def test_a_hook_on_a_state_with_an_extra_computed_from_it_is_refused(layer, at):
    def run(model):
        loss = model()
        model.states[at].register_hook(lambda g: None)
        loss.backward()

    line = rf"blocks.{at} \({layer.__name__}\) returns a tensor that it has computed from its state"
    assert_refused(lambda: made(layer, WithExtras), line, run)


@asserts_same(lambda: made(AfterState, WithExtras))
def test_gradients_of_parameters_alone_beside_such_an_extra(model):
    backward(model)
    return torch.autograd.grad(model(), list(model.emb.parameters()))


class KeepsExit(Shows):
    """Keeps a tensor that is computed from the new state."""

    def forward(self, h):
        h = super().forward(h)
        self.exit = self.f(h)
        return h


@refuses(
    r"blocks.3 \(KeepsExit\) returned, which leads to a tensor inside the layer",
    lambda: made(KeepsExit),
)
def test_a_hook_on_the_last_state_is_refused_where_a_loss_uses_what_follows_it(model):
    h = model.emb(rows())
    for block in model.blocks:
        h = block(h)
    h.register_hook(lambda g: None)
    (model.head(h).sin().sum() + model.blocks[3].exit.sum()).backward()


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
