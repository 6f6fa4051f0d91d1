"""What a model does between two converted layers: the gradient stays exact, or one line says why
it cannot."""

import warnings

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import highway_bp as hb
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
    looping,
    made,
    refuses,
    rows,
    seen_in_loss,
)


class Scales(Shows):
    """The argument, or an attribute of the state, scales the block."""

    def forward(self, h, c=None):
        scale = getattr(h, "factor", 1.0) if c is None else c.sigmoid()
        return h + scale * self.g(self.inside(h))


class WithLoss(Shows):
    def forward(self, h):
        z = self.inside(h)
        return h + self.g(z), z.square().mean()


class WithView(Shows):
    def forward(self, h):
        out = super().forward(h)
        return out, out[:, 0]


class MaySkip(Shows):
    skips = False

    def forward(self, h):
        return h if self.skips else super().forward(h)


def replaces_memory_of_the_state(blocks, h):
    for block in blocks:
        h = block(h)
        h.data = h.data.clamp(-0.5, 0.5)
    return h


def sets_an_attribute_of_the_state(blocks, h):
    for i, block in enumerate(blocks):
        h.factor = 1.0 + i
        h = block(h)
    return h


def changes_an_argument(change):
    def loop(blocks, h):
        c = h.tanh() * 1.0
        for i, block in enumerate(blocks):
            h = block(h, c)
            change(i, c, h)
        return h

    return loop


def writes_into_a_skipped_state(blocks, h):
    states = []
    for i, block in enumerate(blocks):
        block.skips = i == 2
        h = block(h)
        h = h.add_(1) if block.skips else h
        states.append(h)
    return sum(states)


def adds_losses(blocks, h):
    for block in blocks:
        h = add_loss(*block(h))
    return h


def clips_by_hooks(blocks, h):
    for block in blocks:
        h = block(h)
        h.register_hook(lambda g: g.clamp(-1, 1))
        h = 2 * h
    return h


EXACT_LOOPS = {  # and whether the chain ends there
    replaces_memory_of_the_state: (Shows, False),
    sets_an_attribute_of_the_state: (Scales, False),
    changes_an_argument(lambda i, c, h: setattr(c, "data", 0.5 * c.data)): (Scales, True),
    changes_an_argument(lambda i, c, h: c.mul_(h + 1.0) if i == 1 else None): (Scales, True),
    changes_an_argument(lambda i, c, h: c.copy_(h.tanh()) if i == 1 else None): (Scales, True),
    changes_an_argument(lambda i, c, h: c[i].copy_(h[i].tanh())): (Scales, True),
    writes_into_a_skipped_state: (MaySkip, True),
    adds_losses: (WithLoss, True),
    clips_by_hooks: (Shows, True),
}


@both_methods
@pytest.mark.parametrize("loop", EXACT_LOOPS)
def test_between_layers_a_model_may_do_much(loop, method):
    layer, ends_chain = EXACT_LOOPS[loop]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_same(backward, looping(layer, loop), method)
    assert any("a new chain begins there" in str(w.message) for w in told) == ends_chain


def doubles_views(blocks, h):
    for block in blocks:
        h, first = block(h)
        first.mul_(2)
    return h


def reads_views_after(blocks, h):
    total = 0.0
    for block in blocks:
        h, first = block(h)
        h += 1
        total = total + first.sum()
    return h + total


def clamps_the_state(blocks, h):
    for block in blocks:
        h = block(h)
        with torch.no_grad():
            h.clamp_(-2, 2)
    return h


def gives_weights_from_one_stack(blocks, h):
    by_layer = [dict(block.named_parameters()) for block in blocks]
    stacks = {n: torch.stack([p[n] for p in by_layer]).detach() for n in by_layer[0]}
    parts = {n: stack.requires_grad_().unbind() for n, stack in stacks.items()}
    for i, block in enumerate(blocks):
        h = functional_call(block, {n: part[i] for n, part in parts.items()}, (h,))
    return h


@pytest.mark.parametrize(
    ("layer", "loop", "line", "run"),
    [
        (WithView, doubles_views, "returned tensors that share memory", backward),
        (WithView, reads_views_after, "returned tensors that share memory", backward),
        (Shows, clamps_the_state, "what it returned was changed in place since", seen_in_loss),
        (Shows, gives_weights_from_one_stack, "blocks.1 .* uses a tensor of shape", backward),
    ],
)
def test_what_a_model_may_not_do_between_layers(layer, loop, line, run):
    assert_refused(looping(layer, loop), line, run)


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS, hb.MGRIT(2, 2)], ids=str)
def test_tensors_without_numbers(method):
    """Fake ones, by which tools estimate memory."""
    with FakeTensorMode():
        model = hb.convert(Net(), method)
        model(rows().float()).backward()
    assert all(p.grad.shape == p.shape for p in model.blocks[0].parameters())


@refuses("compiled autograd through a chain", lambda: made(Shows))
def test_compiled_autograd_is_refused(model):
    with compiled_autograd._enable(torch.compile(backend="eager")):
        backward(model)


class Frozen(Shows):
    """Runs without a gradient from the second call on."""

    calls = 0

    def forward(self, h):
        self.calls += 1
        with torch.set_grad_enabled(self.calls < 2):
            return super().forward(h)


@asserts_same(lambda: made(Frozen), both=True)
def test_a_layer_that_gives_no_gradient_any_more(model):
    """Layers in front of it get none, and no zeros."""
    for block in [model.blocks[i] for i in (0, 1, 3)]:
        block.calls = -9
    for _ in range(2):
        model.zero_grad()
        backward(model)


def test_functions_between_layers_cost_no_power_of_two():
    calls = []
    counted = function(lambda ctx, x: x.clone(), lambda ctx, g: calls.append(1) or g)

    def loop(blocks, h):
        for block in [*blocks, *blocks, *blocks]:
            h = counted(block(h))
        return h

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backward(hb.convert(looping(Shows, loop)(), hb.Highway(1)))
    assert len(calls) < 2 * 12 * 12
