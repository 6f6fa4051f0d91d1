"""A ResidualChain behaves as any module; what it and its methods refuse."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import highway_bp as hb
from tests.highway_bp.architectures import (
    Plain,
    PlainSplit,
    ReluAfterSum,
    Shortcut,
    bn_conv,
    linear,
    mlp,
    pre_norm_mlp,
)

L = 3
METHODS = [hb.Backprop(), hb.FixedPoint(L), hb.Highway(L), hb.Highway(1), hb.Highway(1, 0.2)]
METHODS += [hb.MGRIT(9, 2)]
EXACT = [hb.Backprop(), hb.FixedPoint(L), hb.Highway(L), hb.Highway(2, group_size=2)]

assert_close = torch.testing.assert_close
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
every_exact_method = pytest.mark.parametrize("method", EXACT, ids=str)


def layers(n: int = L) -> list[nn.Module]:
    torch.manual_seed(1)
    kinds = [Plain, ReluAfterSum, PlainSplit]
    return [kinds[i % len(kinds)](mlp()) for i in range(n)]


def chain(method=None, n: int = L) -> hb.ResidualChain:
    return hb.ResidualChain(layers(n), method or hb.Highway(1)).double()


def plain(n: int = L) -> nn.Sequential:
    return nn.Sequential(*layers(n)).double()


def data() -> Tensor:
    return torch.randn(
        5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )


def gradients(model: nn.Module, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Gradients of a loss on model(x) for the parameters and x; accumulates nowhere."""
    loss = scale * torch.sin(model(x)).sum()
    return list(torch.autograd.grad(loss, [*model.parameters(), x]))


@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("method", [m for m in METHODS if m != hb.Backprop()], ids=str)
def test_second_derivatives_are_refused(method, trainable_head):
    x = data()
    head = nn.Linear(x.shape[-1], 1).to(x.dtype).requires_grad_(trainable_head)
    with pytest.raises(RuntimeError, match="has no second derivative: use Backprop"):
        torch.autograd.grad(head(chain(method)(x)).sum(), x, create_graph=True)


def test_state_dict_is_that_of_sequential():
    ours, theirs = chain().state_dict(), plain().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    nn.Sequential(*layers()).double().load_state_dict(ours)
    chain().load_state_dict(theirs)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_method_and_gradients(copied_by):
    original = chain(hb.Highway(2, gamma=0.1))
    copied = copied_by(original)
    assert copied.method == hb.Highway(2, gamma=0.1)
    assert copied[0] is not original[0]
    assert_close(gradients(copied, data()), gradients(original, data()), rtol=0, atol=0)
    original(data()).sum().backward()
    assert copied_by(original).method == original.method


def test_slices_keep_the_method():
    part = chain(hb.Highway(2))[:2]
    assert isinstance(part, hb.ResidualChain) and len(part) == 2 and part.method == hb.Highway(2)


@every_method
def test_forward_is_exact_with_and_without_gradients(method):
    x, expected = data(), plain()(data())
    assert torch.equal(chain(method)(x), expected)
    with torch.no_grad():
        out = chain(method)(x)
    assert torch.equal(out, expected) and not out.requires_grad
    with torch.inference_mode():
        states = chain(method)(x, return_states=True)
    assert torch.equal(states[-1], expected) and not states[-1].requires_grad


class Borrows(nn.Module):
    """h + f(h), where f is the layer's own or another layer's, which is no submodule."""

    def __init__(self, *owner: nn.Module):
        super().__init__()
        self.owner = owner
        if not owner:
            self.f = nn.Linear(4, 4)

    def forward(self, h):
        return h + (self.owner[0] if self.owner else self).f(h).tanh()


@pytest.mark.parametrize("method", [hb.Highway(9), hb.Highway(9, group_size=2)], ids=str)
def test_layers_that_use_the_weights_of_a_later_layer(method):
    torch.manual_seed(0)
    last = Borrows().double()
    layers, x = [Borrows(last), Borrows(last), last], data().detach()
    models = [nn.Sequential(*layers), hb.ResidualChain(layers, method)]
    found = [torch.autograd.grad(model(x).sin().sum(), last.f.weight) for model in models]
    assert_close(*found)


class ViewCarry:
    """The identity, as an operator that returns a view of what it is given."""

    def vecmat(self, w):
        return w.view(w.shape)


class Adds(PlainSplit):
    """h + 2 bias, whose block does not depend on h."""

    def __init__(self):
        super().__init__(nn.ParameterList([torch.ones(4)]))

    def g(self, h):
        return 2 * self.inner[0]

    def carry(self, h_in, h_out):
        return ViewCarry()


@pytest.mark.parametrize("method", [hb.FixedPoint(9), hb.Highway(9), hb.Highway(9, 1.0)], ids=str)
def test_a_carry_that_returns_a_view(method):
    layers, x = [Adds().double() for _ in range(4)], data()
    found = []
    for chosen in (hb.Backprop(), method):
        states = hb.ResidualChain(layers, chosen)(x, return_states=True)
        loss = sum((i + h).sin().sum() for i, h in enumerate(states))
        found.append(torch.autograd.grad(loss, [x, *(layer.inner[0] for layer in layers)]))
    assert_close(*found)


def test_nothing_requires_a_gradient():
    model = chain().requires_grad_(False)
    assert not model(data().detach()).requires_grad


@every_exact_method
def test_double_use_in_one_graph(method):
    ours, theirs = chain(method), plain()
    found = gradients(nn.Sequential(ours, ours), data())
    assert_close(found, gradients(nn.Sequential(theirs, theirs), data()))


@every_method
def test_backward_passes_add_up(method):
    """Two through one graph, then one through another; a third through the first is refused."""
    model, x = chain(method), data()
    once, leaves = gradients(model, x), [*model.parameters(), x]
    loss = torch.sin(model(x)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([t.grad for t in leaves], [2 * g for g in once], rtol=0, atol=0)
    torch.sin(model(x)).sum().backward()
    assert_close([t.grad for t in leaves], [3 * g for g in once])
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@every_method
def test_each_state_backward_on_its_own_with_retain_graph(method):
    """Two backward passes through different outputs add up to one through both."""
    model, x = chain(method), data()
    leaves = [*model.parameters(), x]
    states = model(x, return_states=True)
    how = dict(retain_graph=True, materialize_grads=True)
    parts = [torch.autograd.grad(h.sum(), leaves, **how) for h in (states[0], states[2])]
    whole = torch.autograd.grad(states[0].sum() + states[2].sum(), leaves)
    assert_close([a + b for a, b in zip(*parts, strict=True)], list(whole))


def test_a_method_may_be_switched_and_backward_uses_that_of_its_forward():
    methods = hb.Highway(0), hb.Backprop()
    wanted = [gradients(chain(method), data()) for method in methods]
    assert not torch.allclose(wanted[0][0], wanted[1][0])
    model, x = chain(), data()
    for first, second in ((0, 1), (1, 0)):
        model.method = methods[first]
        loss = torch.sin(model(x)).sum()
        model.method = methods[second]
        found = torch.autograd.grad(loss, [*model.parameters(), x])
        assert_close(list(found), wanted[first], rtol=0, atol=0)


@every_exact_method
def test_real_dropout_uses_the_masks_of_the_forward_pass(method):
    def dropout_layers():
        torch.manual_seed(1)
        kinds = [Plain, PlainSplit, Plain]
        return [kind(nn.Sequential(mlp(), nn.Dropout(0.5))) for kind in kinds]

    ours = hb.ResidualChain(dropout_layers(), method).double()
    theirs = nn.Sequential(*dropout_layers()).double()
    torch.manual_seed(3)
    found = gradients(ours, data())
    torch.manual_seed(3)
    assert_close(found, gradients(theirs, data()))


@every_method
@pytest.mark.parametrize("kind", [Plain, PlainSplit])
def test_batchnorm_statistics_are_updated_once(method, kind):
    def bn_layers():
        torch.manual_seed(1)
        return [kind(bn_conv()) for _ in range(L)]

    ours, theirs = hb.ResidualChain(bn_layers(), method), nn.Sequential(*bn_layers())
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    ours(x).square().sum().backward()
    theirs(x)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    assert ours[0].inner[0].num_batches_tracked == 1


@every_method
def test_autocast(method):
    """Forward as torch, gradients within rounding; carries are formed under it too."""

    shortcuts = [Shortcut(linear(), nn.Linear(4, 4, bias=False)) for _ in range(2)]
    ours = hb.ResidualChain([*layers(), *shortcuts], method)  # a state in bfloat16 between them
    x = data().detach().float().requires_grad_()
    exact = gradients(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x), nn.Sequential(*ours)(x)
    assert out.dtype == expected.dtype and torch.equal(out, expected)
    found = torch.autograd.grad(torch.sin(out).sum(), [*ours.parameters(), x])
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.float32 and (f - e).norm() <= 0.05 * e.norm()


def test_a_compiled_chain():
    """Its layers are compiled, and a method that is set later holds."""
    torch._dynamo.reset()
    chain = hb.ResidualChain([Plain(pre_norm_mlp(4)).double() for _ in range(12)])
    graphs = CompileCounter()
    compiled = torch.compile(chain, backend=graphs)
    for method in (hb.Highway(2), hb.Backprop(), hb.Highway(0, 0.5)):
        chain.method = method
        assert_close(gradients(compiled, data()), gradients(chain, data()))
    assert graphs.op_count >= 5  # those of a layer


@pytest.mark.parametrize("method", [hb.Highway(2), hb.FixedPoint(1), hb.Backprop()], ids=str)
def test_compiled_layers(method):
    torch._dynamo.reset()

    def two_layers():
        torch.manual_seed(1)
        return [Plain(pre_norm_mlp(4)).double() for _ in range(2)]

    compiled = [torch.compile(layer, backend="aot_eager") for layer in two_layers()]
    expected = gradients(hb.ResidualChain(two_layers(), method), data())
    assert_close(gradients(hb.ResidualChain(compiled, method), data()), expected)


@every_method
def test_the_meta_device(method):
    model = chain(method, n=4).to("meta")
    model(data().detach().to("meta")).sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


def test_an_empty_chain_is_the_identity():
    x = data()
    assert torch.equal(hb.ResidualChain([], hb.Highway(1))(x), x)


@pytest.mark.parametrize("k", [L, L + 4])
def test_k_of_L_and_more_is_exact_and_says_nothing(k):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(chain(hb.Highway(k)), data())
    assert_close(found, gradients(plain(), data()))


def test_nothing_of_a_step_outlives_it():
    """Memory is freed by reference counts alone: no cycle waits for the garbage collector."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, h):
            out = h + super().forward(h)
            seen.append(weakref.ref(out))
            return out

    chain = hb.ResidualChain([Watched(3, 3) for _ in range(3)], hb.Highway(1))
    gc.disable()
    try:
        chain(torch.randn(2, 3)).sum().backward()
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


def test_a_hook_on_a_state_that_no_path_reaches_sees_zeros():
    """As in autograd; two iterations of the fixed point go two layers back from a loss."""
    torch.manual_seed(0)
    states, seen = chain(hb.FixedPoint(2), 8)(data(), return_states=True), []
    states[4].register_hook(lambda g: seen.append(g.clone()))
    (states[-1].sum() + states[2].sum()).backward()
    assert len(seen) == 1 and not seen[0].any()


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 99])
def test_truncated_bptt_detaches_the_state_after_each_window(window):
    """Of recurrent layers test_rnns.py and test_recurrent.py show the same through chains."""
    layers, x = nn.ModuleList(Plain(mlp()) for _ in range(8)).double(), data()
    h, plain = x, []
    for i, layer in enumerate(layers):
        h = layer(h.detach() if i and i % window == 0 else h)
        plain.append(h)
    chain, found = hb.ResidualChain(layers, hb.TruncatedBPTT(window)), []
    for states in (plain, chain(x, return_states=True)):
        x.grad = None
        layers.zero_grad()
        for h in states:
            h.retain_grad()
        sum((1 + i) * h.sin().sum() for i, h in enumerate(states)).backward()
        found.append([t.grad for t in (x, *layers.parameters(), *states)])
    assert_close(*found)


# -- what is refused ------------------------------------------------------------------------------

# Of methods: what is expected, values that are not in range, and values of another type.
ITERATED = (hb.Highway, hb.FixedPoint)
SETTINGS = {
    "k": (ITERATED, "a whole number, at least 0", [-1], [1.5, True, "2", None]),
    "group_size": (ITERATED, "a whole number, at least 1", [0, -2], [1.5]),
    "gamma": (hb.Highway, "a number from 0 to 1, or 'auto'", [2.0, -0.1, math.nan], ["a", True]),
    "tolerance": (hb.Highway, "a number between 0 and 1", [0, 1], [True]),
    "cycles": (hb.MGRIT, "a whole number, at least 0", [-1], [1.5]),
    "coarsening": (hb.MGRIT, "a whole number, at least 2", [1], [None]),
    "levels": (hb.MGRIT, "a whole number, at least 1", [0], [True]),
    "relaxation": (hb.MGRIT, "one of F, FCF", ["FC", None], []),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_a_method_cannot_have(name):
    makers, expected, values, of_another_type = SETTINGS[name]
    for make in makers if isinstance(makers, tuple) else [makers]:
        needed = {} if make is hb.MGRIT else {"k": 1}
        for error, wrong in ((ValueError, values), (TypeError, of_another_type)):
            for value in wrong:
                with pytest.raises(error) as told:
                    make(**{**needed, name: value})
                assert str(told.value) == f"{name}={value!r}; expected {expected}"


@pytest.mark.parametrize("made", [torch.view_as_complex, torch.nested.as_nested_tensor])
def test_complex_and_nested_states_are_refused(made):
    x = made(torch.ones(3, 4, 2)).requires_grad_()
    with pytest.raises(TypeError, match="input state is complex or nested"):
        chain()(x)


def test_unknown_method():
    with pytest.raises(TypeError, match="method"):
        hb.ResidualChain(layers(), "highway")
    model = chain()
    with pytest.raises(TypeError, match="method"):
        model.method = 3
    with pytest.raises(TypeError, match="method"):
        hb.set_method(model, hb.Highway)
