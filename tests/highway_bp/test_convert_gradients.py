"""Who looks at gradients in a converted model sees the whole of them: hooks, retain_grad, losses on
what layers show."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    TOKENS,
    Shows,
    assert_refused,
    assert_same,
    asserts_same,
    backward,
    both_methods,
    logits_loss,
    made,
    refuses,
    rows,
    seen_in_loss,
    with_states,
)
from tests.highway_bp.families import build

# -- hooks ----------------------------------------------------------------------------------------


class RemovesHook(Shows):
    """Sets a hook that acts once, as deep equilibrium layers do."""

    def forward(self, h):
        z = self.inside(h)
        hook = z.register_hook(lambda g: (hook.remove(), g / 2)[1])
        return h + self.g(z)


@pytest.mark.parametrize("method", [hb.Highway(0), EXACT, IN_GROUPS], ids=str)
def test_a_hook_that_removes_itself_is_refused(method):
    def run(model):
        with pytest.raises(RuntimeError, match="cannot run twice"):
            backward(model)
        backward(model)  # again

    line = r"the backward pass of blocks.. \(RemovesHook\) cannot run twice"
    assert_refused(lambda: made(RemovesHook), line, run, method)


class DrawsNumbers(Shows):
    """Random numbers are drawn during the backward pass, as another thread may do."""

    def forward(self, h):
        z = self.inside(h)
        z.register_hook(lambda g: None if torch.rand(()) < 2 else g)
        return h + self.g(z)


@both_methods
def test_random_numbers_drawn_meanwhile_are_no_fault_of_the_layer(method):
    assert_same(backward, lambda: made(DrawsNumbers), method)


@asserts_same()
def test_a_hook_on_a_parameter_runs_once(model):
    for p in model.parameters():
        p.register_hook(lambda g: g / 2)
    logits_loss(model).backward()


def test_hooks_of_parameters_outlive_an_error():
    model, seen = hb.convert(build("gpt2"), hb.Highway(1)), []
    p = model.transformer.h[1].mlp.c_fc.weight
    p.register_hook(lambda g: seen.append(1))
    loss = logits_loss(model)
    loss.backward(retain_graph=True)
    failing = model.transformer.wte.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    failing.remove()
    loss.backward()
    assert len(seen) == 3


@asserts_same(both=True)
def test_retain_grad(model):
    out = with_states(model)
    for h in out.hidden_states:
        h.retain_grad()
    (out.loss + out.hidden_states[2].square().sum()).backward()
    return [h.grad for h in out.hidden_states]


@asserts_same(both=True)
def test_autograd_grad(model):
    out, parameters = with_states(model), list(model.parameters())
    asked = [*out.hidden_states[:3], *parameters]
    loss = out.loss + out.hidden_states[1].square().sum()
    found = torch.autograd.grad(loss, asked, allow_unused=True)
    for p, g in zip(parameters, found[3:], strict=True):
        p.grad = g
    return found[:3]


@asserts_same(both=True)
def test_a_second_loss_where_a_hook_was_shown_what_came_from_behind(model):
    out, seen = with_states(model), []
    out.hidden_states[2].register_hook(lambda g: seen.append(g.clone()))
    out.loss.backward(retain_graph=True)
    out.hidden_states[2].square().sum().backward()
    return seen


@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@asserts_same(both=True)
def test_retain_grad_of_attention(model, in_loss, times):
    out, seen = model(**TOKENS, output_attentions=True, output_hidden_states=True), []
    for t in out.attentions:
        t.retain_grad()
    out.hidden_states[1].register_hook(lambda g: seen.append(g.clone()))
    loss = out.loss + (out.attentions[1].square().sum() if in_loss else 0)
    for i in reversed(range(times)):
        loss.backward(retain_graph=i > 0)
    return [*(t.grad for t in out.attentions), *seen]


@refuses(r"on a tensor inside transformer.h.1 \(GPT2Block\)")
def test_a_hook_on_attention_is_refused(model):
    out = model(**TOKENS, output_attentions=True)
    out.attentions[1].register_hook(lambda g: None)
    out.loss.backward()


@pytest.mark.parametrize("asked", ["output_attentions", "output_router_logits"])
def test_a_loss_on_what_transformers_records_needs_no_second_run(asked):
    model, runs = hb.convert(build("mixtral"), hb.Highway(1)), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    out = model(**TOKENS, **{asked: True})
    (out.loss + sum(t.sum() for t in out.attentions or ())).backward()
    assert len(runs) == 1


@asserts_same(both=True)
def test_a_second_run_with_recorded_attention(model):
    shown = []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda module, args, out: shown.append(out))
    out = model(**TOKENS, output_attentions=True)
    inside = [*shown, *out.attentions]
    (out.loss + sum((i + 1) * t.square().sum() for i, t in enumerate(inside))).backward()


def test_backward_hooks_of_modules_inside_are_warned_of_once():
    model, seen = hb.convert(build("gpt2"), hb.Highway(1)), []
    model.transformer.h[1].mlp.register_full_backward_hook(lambda *_: seen.append(1))
    with pytest.warns(
        UserWarning, match=r"inside transformer.h.1 \(GPT2Block\) run once per"
    ) as told:
        for _ in range(2):
            logits_loss(model).backward()
    assert len(told) == 1 and len(seen) > 2


# -- layers that show what is inside -------------------------------------------------------------


class ShowsGate(Shows):
    def forward(self, h):
        self.seen = torch.sigmoid(self.scale)
        return h + self.seen * self.g(self.inside(h))


class ShowsDropped(Shows):
    def inside(self, h):
        return nn.functional.dropout(super().inside(h), training=True)


@pytest.mark.parametrize("look", ["hook", "retain_grad"])
@refuses(r"on a tensor inside blocks.1 \(Shows\)", made)
def test_a_look_at_the_gradient_inside_a_layer_is_refused_where_it_is_not_whole(model, look):
    loss = model()
    seen = model.blocks[1].seen
    seen.register_hook(lambda g: None) if look == "hook" else seen.retain_grad()
    (loss + seen.square().sum()).backward()


class ShowsCount(Shows):
    def inside(self, h):
        self.calls = [*getattr(self, "calls", ()), h.shape]
        return len(self.calls) * super().inside(h)


@both_methods
@pytest.mark.parametrize("layer", [Shows, ShowsGate, ShowsDropped])
def test_a_loss_on_what_layers_keep(layer, method):
    """Of states, of weights alone (which uses up a part of the graph), of random numbers."""
    assert_same(lambda model: seen_in_loss(model.eval()), lambda: made(layer), method)


@refuses(r"inside a group of layers.*expected group_size=1", method=IN_GROUPS)
def test_a_look_at_a_state_inside_a_group_with_a_loss_inside_its_layers_is_refused(model):
    shown = []
    model.transformer.h[1].mlp.register_forward_hook(lambda *call: shown.append(call[2]))
    out = with_states(model)
    out.hidden_states[1].retain_grad()
    (out.loss + shown[0].sum()).backward()


def test_a_second_run_that_gives_another_state_is_refused():
    line = r"blocks.0 \(ShowsCount\) has to be run once more .* gave other results"
    assert_refused(lambda: made(ShowsCount), line, seen_in_loss)
    assert_same(lambda model: seen_in_loss(model, retain_graph=True), lambda: made(ShowsCount))

    def in_bfloat16(model):
        model(rows().bfloat16())
        (model.states[-1].sum() + sum(block.seen.sum() for block in model.blocks)).backward()

    assert_refused(lambda: made(ShowsCount).bfloat16(), line, in_bfloat16)


@refuses("a weight or its input has been changed since", made)
def test_a_second_run_with_other_weights_is_refused(model):
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, weights) + sum(b.seen.sum() for b in model.blocks)
    loss.backward()
