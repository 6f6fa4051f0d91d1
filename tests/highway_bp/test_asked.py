"""Gradients that autograd is asked for: in full, or refused in one line."""

import io
import warnings
from functools import partial

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
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
from tests.highway_bp.test_looked_at import AfterState, Bias, HandsOn, KeepsExit, WithExtras


class Inside(Shows):
    """An extra that the state depends on, as attention weights are."""

    def forward(self, h):
        z = self.inside(h)
        return h + self.g(z), z


def asked(model, t, how):
    """The gradient of a result, t(model), by one of the ways to ask autograd for it."""
    loss, t = model(), t(model)
    if how == "backward":
        loss.backward(inputs=[t])
        return [t.grad]
    if how == "C++":
        engine = torch.autograd.Variable._execution_engine
        one = torch.ones_like(loss)
        return engine.run_backward((loss,), (one,), False, False, (t,), True, False)
    if how == "with parameters":
        return torch.autograd.grad(loss, [t, *model.emb.parameters()])
    inputs = {"grad": t, "edge": get_gradient_edge(t), "generator": (t for t in [t])}[how]
    return torch.autograd.grad(loss, inputs)


WAYS = ["grad", "edge", "generator", "backward", "with parameters"]


class Beside(Shows):
    """An extra of which no state is made, for a loss of its own."""

    def forward(self, h):
        return h + self.g(self.inside(h)), self.f(h).square()


EXACT_RESULTS = [
    (layer, of, how)
    for layer, of in (
        (Inside, "states"),
        (Bias, "states"),
        (AfterState, "extras"),
        (Beside, "extras"),
    )
    for how in WAYS + ["C++"] * (of == "states")
]


@both_methods
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize(("layer", "of", "how"), EXACT_RESULTS)
def test_autograd_grad_of_a_state_or_of_an_extra_that_nothing_depends_on(
    method, layer, of, at, how
):
    def run(model):
        backward(model)
        return asked(model, lambda model: getattr(model, of)[at], how)

    assert_same(run, lambda: made(layer, WithExtras), method)


@asserts_same(lambda: made(Inside, WithExtras), both=True)
def test_retain_grad_behind_the_state_that_is_asked_for(model):
    """No solve runs, so none completes what is retained."""
    backward(model)
    loss = model()
    for state in model.states:
        state.retain_grad()
    torch.autograd.grad(loss, model.states[1])
    return [state.grad for state in model.states[1:]]


@refuses(
    r"gradient of what blocks.2 \(Inside\) returned beside its state",
    lambda: made(Inside, WithExtras),
)
def test_retain_grad_of_an_extra_behind_the_state_that_is_asked_for_is_refused(model):
    loss = model()
    model.extras[2].retain_grad()
    torch.autograd.grad(loss, model.states[1])


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("layer", [Inside, Bias])
def test_autograd_grad_of_an_extra_is_refused(layer, at, how):
    def run(model):
        asked(model, lambda model: model.extras[at], how)

    net = HandsOn if layer is Bias else WithExtras
    line = rf"gradient of what blocks.{at} \({layer.__name__}\) returned beside its state"
    assert_refused(lambda: made(layer, net), line, run)


@both_methods
@pytest.mark.parametrize("at", [1, 3])
def test_autograd_grad_where_the_loss_uses_one_result_alone(method, at):
    """Beside an extra computed from the state, and of an extra that the state depends on."""

    def of_a_state(model):
        return torch.autograd.grad(model.states[at].sin().sum(), model.states[at])

    def of_an_extra(model):
        return torch.autograd.grad(model.extras[at].sin().sum(), model.extras[at])

    def keep(run):
        return lambda model: (model().backward(retain_graph=True), run(model))[1]

    assert_same(keep(of_a_state), lambda: made(AfterState, WithExtras), method)
    assert_same(keep(of_an_extra), lambda: made(Inside, WithExtras), method)


@asserts_same(lambda: made(KeepsExit), both=True)
def test_a_gradient_of_outputs_is_no_loss(model):
    h, states = model.emb(rows()), []
    for block in model.blocks:
        states.append(h := block(h))
    weights = torch.ones_like(h) * model.blocks[2].exit.mean().detach().requires_grad_()
    backward(model)
    return torch.autograd.grad(h, states[2], weights + 0 * model.blocks[2].exit.mean())


@asserts_same(lambda: made(Inside, WithExtras))
def test_autograd_grad_of_an_extra_behind_layers_whose_graphs_are_freed(model):
    model()
    model.states[1].sum().backward()
    return torch.autograd.grad(model.extras[3].sin().sum(), model.extras[3])


LOOKS = {  # behind the state that is asked for
    "hook inside": lambda model: model.blocks[2].kept.register_hook(lambda g: None),
    "retain_grad inside": lambda model: model.blocks[2].kept.retain_grad(),
    "hook on an extra": lambda model: model.extras[2].register_hook(lambda g: None),
    "written": lambda model: model.extras[2].mul_(2),
}


class KeepsAndReturns(Shows):
    def forward(self, h):
        self.kept = self.inside(h)
        z = self.g(self.kept)
        return h + z, z.view(-1), z


class Written(WithExtras):
    def forward(self, x=None):
        h, self.states, self.extras = self.emb(torch.ones(5, 6).double()), [], []
        for block in self.blocks:
            h, extra, same = block(h)
            self.states.append(h)
            self.extras.append(extra)
        return self.head(h).sin().sum() + same.square().sum() + extra.sum()


@pytest.mark.parametrize("look", LOOKS)
def test_what_a_solve_would_refuse_is_refused_without_one(look):
    def run(model):
        loss = model()
        LOOKS[look](model)
        torch.autograd.grad(loss, model.states[0])

    line = "share memory" if look == "written" else "a hook or retain_grad on a tensor inside"
    assert_refused(lambda: made(KeepsAndReturns, Written), line, run)


@pytest.mark.parametrize("how", ["grad", "backward"])
@refuses("was interrupted by another one", lambda: made(Inside, WithExtras))
def test_a_call_within_a_call_through_the_same_chain_is_refused(model, how):
    loss, inner = model(), []
    inner_loss = model.states[2].sin().sum()

    def calls(g):
        handle.remove()
        if how == "grad":
            inner.append(torch.autograd.grad(inner_loss, model.states[1], retain_graph=True))
        else:
            inner_loss.backward(retain_graph=True)

    handle = model.states[2].register_hook(calls)
    loss.backward(retain_graph=True)


@asserts_same(lambda: made(Inside, WithExtras), both=True)
def test_a_call_from_a_hook_before_the_chain_is_reached(model):
    loss, inner = model(), []
    inner_loss = model.states[3].square().sum()
    loss.register_hook(
        lambda g: inner.extend(torch.autograd.grad(inner_loss, model.states[1], retain_graph=True))
    )
    loss.backward()
    return inner


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("at", [1, 3])
def test_autograd_grad_of_a_state_with_an_extra_computed_from_it_is_refused(at, how):
    def run(model):
        asked(model, lambda model: model.states[at], how)

    line = rf"blocks.{at} \(AfterState\) returns a tensor that it has computed from its state"
    assert_refused(lambda: made(AfterState, WithExtras), line, run)


@pytest.mark.parametrize("look", ["grad", "retain_grad", "hook"])
@pytest.mark.parametrize("at", [0, 2, 3])
@both_methods
def test_autograd_grad_of_a_state_is_refused_where_a_loss_uses_what_follows_it(method, at, look):
    """Autograd does not run that path, as it leads to nothing that was asked for."""
    model, states = hb.convert(made(KeepsExit), method), []
    h = model.emb(rows())
    for block in model.blocks:
        states.append(h := block(h))
    if look == "retain_grad":
        states[at].retain_grad()
    elif look == "hook":
        states[at].register_hook(lambda g: None)
    loss = model.head(h).sin().sum() + sum(block.exit.sum() for block in model.blocks)
    with pytest.raises(RuntimeError, match="leads to a tensor inside the layer that a loss uses"):
        torch.autograd.grad(loss, states[at if look == "grad" else 0])


def test_a_state_is_saved_without_a_warning():
    model = hb.convert(made(Inside, WithExtras), EXACT)
    model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.save(model.states, io.BytesIO())
    assert told == []


class KeepsInside(Shows):
    def forward(self, h):
        self.kept = self.inside(h)
        return h + self.g(self.kept)


def test_autograd_grad_of_a_state_beside_a_loss_inside_its_group():
    def run(model, at, inside):
        h, states = model.emb(rows()), []
        for block in model.blocks:
            states.append(h := block(h))
        loss = model.head(h).sin().sum() + model.blocks[inside].kept.sum()
        backward(model)
        return torch.autograd.grad(loss, states[at])

    in_groups = hb.Highway(99, group_size=2)
    for at, inside in ((0, 0), (0, 2), (1, 1), (2, 1), (3, 1)):
        asked_at = partial(run, at=at, inside=inside)
        assert_same(asked_at, lambda: made(KeepsInside), in_groups)
    with pytest.raises(RuntimeError, match="leads to a tensor inside the layer that a loss uses"):
        run(hb.convert(made(KeepsInside), in_groups), 0, 1)
