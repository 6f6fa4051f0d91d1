"""Custom functions inside layers: exact, or refused where they cannot run several times."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.layer_checks import is_linear
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
    seen_in_loss,
)


def with_function(apply) -> type[nn.Module]:
    """h + g(apply(inside(h)))."""

    class WithFunction(Shows):
        def forward(self, h):
            return h + self.g(apply(self.inside(h), self))

    return WithFunction


def saving(ctx, x, *_):
    ctx.save_for_backward(x)
    return x.sin()


def overwriting(ctx, g):
    """The gradient takes the memory of what was saved, as in fused kernels."""
    (x,) = ctx.saved_tensors
    x.data.copy_(g * x.cos())
    return x, None


def product(ctx, x, layer):
    ctx.save_for_backward(x, layer.scale)
    return x * layer.scale


def freeing(ctx, g):
    """The gradient of x is right every time, and that of the scale once."""
    x, scale = ctx.saved_tensors
    by_scale = (g * x).sum(0)
    x.data.zero_()
    return g * scale, by_scale


def keeping(ctx, x, *_):
    ctx.x = x.detach()
    return x.sin()


def once(ctx, g):
    x, ctx.x = ctx.x, None
    return g * x.cos(), None


def noisy(ctx, g):
    return g + 0.1 * torch.randn_like(g) * g.abs(), None


def counting(ctx, x, layer):
    ctx.layer = layer
    return x.clone()


def count(ctx, g):
    ctx.layer.amax.mul_(0.9).add_(0.1 * g.abs().max())
    return g, None


class Counts(with_function(function(counting, count))):
    def __init__(self):
        super().__init__()
        self.register_buffer("amax", torch.ones(()))


UNREPEATABLE = {
    "overwriting": with_function(function(saving, overwriting)),
    "freeing": with_function(
        lambda x, layer: function(lambda c, x, s: product(c, x, layer), freeing)(x, layer.scale)
    ),
    "once": with_function(function(keeping, once)),
    "noisy": with_function(function(lambda ctx, x, _: x.clone(), noisy)),
    "counting": Counts,
}


def on_states(model):
    """With a loss on every state."""
    model()
    sum(h.square().sum() for h in model.states).backward()


def look(model):
    """At a state, without a solve."""
    torch.autograd.grad(model(), model.states[0])


def after_zero_weights(model):
    """The first pass shows nothing of the function."""
    with torch.no_grad():
        weights = [block.g.weight.clone() for block in model.blocks]
        [block.g.weight.zero_() for block in model.blocks]
    backward(model)
    with torch.no_grad():
        [block.g.weight.copy_(w) for block, w in zip(model.blocks, weights, strict=True)]
    backward(model)


@pytest.mark.parametrize("method", [hb.Highway(0), EXACT, IN_GROUPS], ids=str)
@pytest.mark.parametrize("run", [backward, on_states, look, after_zero_weights])
@pytest.mark.parametrize("layer", UNREPEATABLE.values(), ids=UNREPEATABLE)
def test_a_function_that_cannot_run_twice_is_refused(layer, run, method):
    line = r"the backward pass of blocks.. \(\w+\) cannot run twice"
    assert_refused(lambda: made(layer), line, run, method)


clip = function(lambda ctx, x, *_: x.clone(), lambda ctx, g, *_: g.clamp(-1e-3, 1e-3))


class Clips(Shows):
    def forward(self, h):
        return h + self.g(self.inside(clip(h)))


class ClipsByHook(Shows):
    def forward(self, h):
        z = self.inside(h)
        z.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return h + self.g(z)


class AddsLoss(Shows):
    weight = 1.0  # of the added loss

    def forward(self, h):
        z = self.inside(h)
        return h + add_loss(self.g(z), self.weight * z.square().mean())


@pytest.mark.parametrize(
    ("layer", "does"),
    [
        (Clips, "clips the gradient"),
        (ClipsByHook, "clips the gradient"),
        (AddsLoss, "adds to the gradient"),
    ],
)
def test_what_is_exact_for_single_layers_is_refused_where_their_parts_are_added(layer, does):
    assert_same(on_states, lambda: made(layer))
    line = rf"blocks.. \({layer.__name__}\) {does} in its backward pass"
    for method in (IN_GROUPS, hb.MGRIT(4, 2)):
        assert_refused(lambda: made(layer), line, on_states, method)


def test_a_product_that_overflows_in_half_precision_is_not_taken_for_clipped():
    w = torch.ones(4, 4)
    assert is_linear(lambda w: (w.half() * 100).float(), w, 0.05)
    assert not is_linear(lambda w: w.half().clamp(-100, 100).float(), w, 0.05)


class KeepsAndAdds(AddsLoss):
    def inside(self, h):
        self.seen = super().inside(h)
        return self.seen


@refuses("adds to the gradient .* inside layers", lambda: made(KeepsAndAdds))
def test_a_loss_inside_a_layer_that_adds_one_of_its_own_is_refused(model):
    seen_in_loss(model)


class Scaled(Shows):
    def forward(self, h):
        return h + 1e-6 * self.scale * self.g(self.inside(h))


@pytest.mark.parametrize("method", [IN_GROUPS, hb.MGRIT(4, 2)], ids=str)
def test_rounding_errors_of_a_small_block_are_not_taken_for_clipping(method):
    """Of a LayerScale that begins with 1e-6, as ConvNeXt's."""

    def run(model):
        h, loss = rows().float(), 0.0
        for block in model.blocks:
            h = block(h)
            loss = loss + h.sin().sum()
        loss.backward()

    assert_same(run, lambda: made(Scaled).float(), method, tolerance=1e-3)


@refuses("adds to the gradient", lambda: made(AddsLoss), IN_GROUPS)
def test_losses_added_from_the_second_step_on_are_refused(model):
    for weight in (0.0, 1.0):
        for block in model.blocks:
            block.weight = weight
        on_states(model)


class WritesIntoGradient(Shows):
    """Ends in a function that returns the memory of the gradient that it was given."""

    apply = function(lambda ctx, x: 2 * x, lambda ctx, g: g.data.mul_(2))

    def forward(self, h):
        return type(self).apply(super().forward(h))


@both_methods
def test_a_function_that_writes_into_the_gradient_it_is_given(method):
    assert_same(backward, lambda: made(WritesIntoGradient), method)


@pytest.mark.parametrize(
    "write", [lambda g: g.mul_(0.5), lambda g: g.clamp_(-1e-2, 1e-2)], ids=["scale", "clamp"]
)
@asserts_same(made)
def test_hooks_on_states_that_write_into_the_gradient(model, write):
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, h: h.register_hook(write) and None)
    model().backward()


def nearly(ctx, g):
    """The order of sums varies, as in kernels with atomic additions."""
    return g * (1 + 1e-6 * torch.randn(g.shape, generator=ORDER)), None


ORDER = torch.Generator().manual_seed(0)
noise = function(lambda ctx, x, *_: x.clone(), nearly)


class LastBits(with_function(noise)):
    """Has a bias whose gradient cancels."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, h):
        z = super().forward(h)
        return z + torch.softmax(torch.cat([z, z], -1) + self.bias.sum(), -1)[..., :6] * 0.1


@both_methods
def test_a_function_whose_last_bits_vary_is_not_refused(method):
    assert_same(backward, lambda: made(LastBits), method, tolerance=1e-4)


class Looks(with_function(function(lambda ctx, x, _: x.sin(), lambda ctx, g: (g, None)))):
    """Has a table, whose gradient is sparse."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6, sparse=True)

    def forward(self, h):
        return super().forward(h) + self.table(torch.arange(5))


@asserts_same(lambda: made(Looks))
def test_sparse_gradients_beside_a_function(model):
    model().backward()
    for block in model.blocks:
        block.table.weight.grad = block.table.weight.grad.to_dense()


def test_gradients_that_a_function_returns_in_the_same_memory():
    memory = torch.zeros(6).double()

    def by_both(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, torch.sum(g * x, 0, out=memory)

    class Shared(Shows):
        apply = function(lambda ctx, x, scale: product(ctx, x, ctx_layer(scale)), by_both)

        def forward(self, h):
            return h + self.g(type(self).apply(self.inside(h), self.scale))

    def ctx_layer(scale):
        return type("Layer", (), {"scale": scale})

    assert_same(backward, lambda: made(Shared))


def test_one_layer_of_many_that_cannot_run_twice_is_refused_at_once():
    class Third(Shows):
        bad = False

        def forward(self, h):
            def forward(ctx, x, layer):
                ctx.is_bad = layer.bad
                return saving(ctx, x)

            def back(ctx, g):
                (x,) = ctx.saved_tensors
                return overwriting(ctx, g) if ctx.is_bad else (g * x.cos(), None)

            return h + self.g(function(forward, back)(self.inside(h), self))

    def make():
        model = made(Third)
        model.blocks[2].bad = True
        return model

    assert_refused(make, r"blocks.2 \(Third\) cannot run twice")


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
