"""Gradients that autograd is asked for alone: in full, or refused in one line."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from tests.highway_bp.converted import (
    IN_GROUPS,
    Shows,
    assert_refused,
    assert_same,
    asserts_same,
    backward,
    both_methods,
    made,
    refuses,
)
from tests.highway_bp.test_looked_at import (
    AfterState,
    AfterStateByChain,
    Bias,
    HandsOn,
    Inside,
    KeepsExit,
    WithExtras,
)


def asked(model, of, at, how):
    """The gradient of a state or an extra, by one of the ways to ask autograd for it."""
    loss = model()
    t = getattr(model, of)[at]
    if how == "backward":
        loss.backward(inputs=[t])
        return [t.grad]
    if how == "hook":
        t.register_hook(lambda g: None)
        return loss.backward()
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
    *((layer, "states", how) for layer in (Inside, Bias) for how in [*WAYS, "C++"]),
    *((layer, "extras", how) for layer in (AfterState, Beside) for how in WAYS),
]


@both_methods
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize(("layer", "of", "how"), EXACT_RESULTS)
def test_autograd_grad_of_a_result_that_no_other_depends_on(method, layer, of, at, how):
    def run(model):
        backward(model)
        return asked(model, of, at, how)

    assert_same(run, lambda: made(layer, WithExtras), method)


@refuses("autograd.grad of a state that has hooks", made)
def test_a_state_with_hooks_that_is_asked_for_together_with_parameters(model):
    """torch gives the gradient before the hooks if a parameter lies in front, else after them."""
    loss, h = model(), model.states[1]
    h.register_hook(lambda g: 2 * g)
    torch.autograd.grad(loss, [h, *model.blocks[2].parameters()])


@asserts_same(made, both=True)
def test_a_hook_on_a_state_in_a_backward_pass_that_is_called_in_cpp(model):
    """As by Megatron: no one can tell which gradients were asked for."""
    loss = model()
    model.states[1].register_hook(lambda g: 2 * g)
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)


@asserts_same(lambda: made(Inside, WithExtras), both=True)
def test_retain_grad_behind_the_state_that_is_asked_for(model):
    """No solve runs, so none completes what is retained."""
    backward(model)
    loss = model()
    [state.retain_grad() for state in model.states]
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


@both_methods
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(("layer", "of"), [(AfterState, "states"), (Inside, "extras")])
def test_autograd_grad_where_the_loss_uses_one_result_alone(method, layer, of, at):
    def run(model):
        model().backward(retain_graph=True)
        t = getattr(model, of)[at]
        return torch.autograd.grad(t.sin().sum(), t)

    assert_same(run, lambda: made(layer, WithExtras), method)


@asserts_same(lambda: made(KeepsExit), both=True)
def test_a_gradient_of_outputs_is_no_loss(model):
    model()
    h, state, exit = model.states[3], model.states[2], model.blocks[2].exit
    weights = torch.ones_like(h) * exit.mean().detach().requires_grad_()
    backward(model)
    return torch.autograd.grad(h, state, weights + 0 * exit.mean())


@asserts_same(lambda: made(Inside, WithExtras))
def test_autograd_grad_of_an_extra_behind_layers_whose_graphs_are_freed(model):
    model()
    model.states[1].sum().backward()
    return torch.autograd.grad(model.extras[3].sin().sum(), model.extras[3])


ALONE = {  # asked for alone: autograd does not go to all states
    "last layer": lambda model: model.blocks[3].parameters(),
    "first layer": lambda model: model.blocks[0].f.parameters(),
    "embedding": lambda model: [model.emb.weight],
    "head": lambda model: [model.head.weight],
    "state": lambda model: [model.states[1], *model.blocks[2].g.parameters()],
    "inner weight": lambda model: [model.blocks[2].scale],
}


@both_methods
@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("of", ALONE)
def test_retain_grad_is_filled_where_autograd_itself_goes(method, of, how):
    def run(model):
        loss = model()
        looked_at = [*model.states[:3], *(block.seen for block in model.blocks)]
        [t.retain_grad() for t in looked_at]
        alone = list(ALONE[of](model))
        if how == "grad":
            found = list(torch.autograd.grad(loss, alone, retain_graph=True))
        else:
            loss.backward(inputs=alone, retain_graph=True)
            found = [t.grad.clone() for t in alone]
        found += [torch.zeros(()) if t.grad is None else t.grad.clone() for t in looked_at]
        loss.backward()
        return found + [t.grad for t in looked_at]

    assert_same(run, made, method)


def of_the_last_layer(model, loss):
    torch.autograd.grad(loss, [*model.blocks[3].parameters()])


@refuses(r"a hook on a state of blocks.1 \(Shows\) that leads to none of them", made)
def test_a_hook_where_autograd_itself_does_not_go_is_refused(model):
    loss = model()
    model.states[1].register_hook(lambda g: None)
    of_the_last_layer(model, loss)


@pytest.mark.parametrize("look", ["states", "extras"])
@refuses("which leads to no gradient that was asked for", lambda: made(Inside, WithExtras))
def test_retain_grad_where_autograd_itself_does_not_go_beside_a_loss_is_refused(model, look):
    loss = model() + model.states[1].sum()
    getattr(model, look)[1].retain_grad()
    of_the_last_layer(model, loss)


@both_methods
@pytest.mark.parametrize("asked_at", [0, 1])
def test_retain_grad_of_a_state_where_an_extra_is_asked_for(method, asked_at):
    """It does not lie behind the state; no solve runs."""

    def run(model, used):
        loss = model() + (model.states[1].sum() if used else 0)
        model.states[1].retain_grad()
        found = torch.autograd.grad(loss, model.extras[asked_at], retain_graph=True)
        assert model.states[1].grad is None
        loss.backward()
        return [*found, model.states[1].grad]

    make = partial(made, Beside, WithExtras)
    assert_same(partial(run, used=False), make, method)
    assert_refused(
        make, "which leads to no gradient that was asked", partial(run, used=True), method
    )


@both_methods
@pytest.mark.parametrize(("of", "at"), [("states", 1), ("extras", 0)])
def test_retain_grad_of_an_extra_that_leads_to_nothing_is_refused(method, of, at):
    def run(model):
        loss = model()
        model.extras[1].retain_grad()
        torch.autograd.grad(loss, getattr(model, of)[at])

    line = "which leads to no gradient that was asked"
    assert_refused(lambda: made(Beside, WithExtras), line, run, method)


@asserts_same(lambda: made(Bias, HandsOn), both=True)
def test_retain_grad_behind_an_extra_that_later_layers_get(model):
    """Of the first layer, whose weight all later layers reach by its extra."""
    loss = model()
    model.states[0].retain_grad(), model.states[2].retain_grad()
    found = torch.autograd.grad(loss, [model.blocks[0].scale], retain_graph=True)
    first = [state.grad.clone() for state in (model.states[0], model.states[2])]
    loss.backward()
    return [*found, *first, model.states[0].grad, model.states[2].grad]


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


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    ("layer", "of", "how"),
    [
        *((layer, "extras", how) for layer in (Inside, Bias) for how in WAYS),
        *((AfterState, "states", how) for how in [*WAYS, "hook"]),
        (AfterStateByChain, "states", "hook"),
    ],
)
def test_a_look_at_one_of_two_results_that_depend_on_each_other_is_refused(layer, of, how, at):
    net = HandsOn if layer is Bias else WithExtras
    if of == "extras":
        line = rf"gradient of what blocks.{at} \({layer.__name__}\) returned beside its state"
    else:
        line = rf"blocks.{at} \({layer.__name__}\) returns a tensor that it has computed from its"
    assert_refused(lambda: made(layer, net), line, partial(asked, of=of, at=at, how=how))


@pytest.mark.parametrize("look", ["grad", "retain_grad", "hook", "hook and backward"])
@pytest.mark.parametrize("at", [0, 2, 3])
@both_methods
def test_a_look_at_a_state_is_refused_where_a_loss_uses_what_follows_it(method, at, look):
    """Autograd does not run that path, as it leads to nothing that was asked for."""

    def run(model):
        loss = model() + sum(block.exit.sum() for block in model.blocks)
        if look == "retain_grad":
            model.states[at].retain_grad()
        elif look != "grad":
            model.states[at].register_hook(lambda g: None)
        if look == "hook and backward":
            loss.backward()
        torch.autograd.grad(loss, model.states[at if look == "grad" else 0])

    line = (
        rf"blocks.{at} \(KeepsExit\) returned, which leads to a tensor inside the layer that a loss"
    )
    assert_refused(lambda: made(KeepsExit), line, run, method)


@pytest.mark.parametrize(("at", "inside"), [(0, 0), (0, 1), (0, 2), (1, 1), (2, 1), (3, 1)])
def test_autograd_grad_of_a_state_beside_a_loss_inside_its_group(at, inside):
    def run(model):
        loss = model() + model.blocks[inside].seen.sum()
        state = model.states[at]
        backward(model)
        return torch.autograd.grad(loss, state)

    if (at, inside) == (0, 1):
        line = "leads to a tensor inside the layer that a loss uses"
        assert_refused(made, line, run, IN_GROUPS)
    else:
        assert_same(run, made, IN_GROUPS)
