"""`hb.ResidualLayer`: layers whose residual path is cut."""

import types

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from tests.highway_bp.architectures import Plain, Split, linear, tanh
from tests.highway_bp.converted import EXACT, rows


class Sum(Split, Plain):
    """h + tanh(f(h)), an `hb.ResidualLayer`."""

    def __init__(self):
        super().__init__(tanh(6))


class Gated(Plain):
    """tanh(gate) h + tanh(f(h)), halved in training."""

    def __init__(self):
        super().__init__(tanh(6))
        self.gate = nn.Parameter(torch.ones(6))

    def factor(self):
        return self.gate.tanh() * (0.5 if self.training else 1.0)

    def r(self, h, z):
        return self.factor() * h + z

    def carry(self, h_in, h_out):
        return self.factor().detach()


def assert_as_in_sequence(plain: nn.Sequential) -> None:
    """A chain of the same layers has the same output and gradients."""
    x, found = rows().requires_grad_(), []
    for model in (plain.double(), hb.ResidualChain(plain, EXACT)):
        torch.manual_seed(1)
        out = model(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *plain.parameters()])])
    torch.testing.assert_close(*found)


def test_a_layer_may_change_between_forward_and_backward():
    torch.manual_seed(0)
    chain = hb.ResidualChain([Gated() for _ in range(3)], EXACT).double()
    x, found = rows().requires_grad_(), []
    for model in (nn.Sequential(*chain), chain):
        loss = model.train()(x).square().sum()
        model.eval()  # halves the carry
        found += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*found)


def test_cut_layers_inside_a_checkpoint():
    torch.manual_seed(0)
    chain, x = hb.ResidualChain([Sum() for _ in range(3)], EXACT).double(), rows().requires_grad_()
    outputs = chain(x), checkpoint(chain, x, use_reentrant=False)
    found = [torch.autograd.grad(out.square().sum(), x) for out in outputs]
    torch.testing.assert_close(*found)


class Overridden(Sum):
    def forward(self, h):
        return 3 * super().forward(h)


def test_a_forward_or_hook_of_a_residual_layer_is_not_bypassed():
    torch.manual_seed(0)
    plain = nn.Sequential(Overridden(), Sum(), Sum())
    plain[1].forward = types.MethodType(Overridden.forward, plain[1])
    plain[1].__class__ = Overridden
    plain[2].register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
    assert_as_in_sequence(plain)


class Called(Sum):
    def __call__(self, h):
        return 3 * super().__call__(h)


def test_a_hook_of_all_modules_or_a_call_of_its_own_is_not_bypassed():
    torch.manual_seed(0)
    hook = register_module_forward_hook(lambda m, _, out: 2 * out if isinstance(m, Sum) else out)
    try:
        assert_as_in_sequence(nn.Sequential(Called(), Sum()))
    finally:
        hook.remove()


class ByThoseNames(Plain):
    """Has a block and a residual, which its forward pass uses in a way of its own."""

    def __init__(self):
        super().__init__(tanh(6))
        self.block = nn.Linear(6, 6)

    def residual(self, h, z):
        return h + self.block(z)

    def forward(self, h):
        return self.residual(h, self.inner(h))


class KnowsItsCarry(Plain):
    def with_carry(self, h):
        return super().forward(h), None

    def forward(self, h):
        return self.with_carry(h)[0]


class KnewItsCarry(KnowsItsCarry):
    def forward(self, h):
        return 3 * super().forward(h)


@pytest.mark.parametrize("layer", [ByThoseNames, lambda: KnewItsCarry(tanh(6))])
def test_only_the_layers_own_forward_counts(layer):
    torch.manual_seed(0)
    assert_as_in_sequence(nn.Sequential(layer(), layer()))


class Skip(nn.Module):
    """A skip that the class does not declare: learned, random, almost the identity, or stored."""

    def __init__(self, skip):
        super().__init__()
        self.f, self.s, self.skip = tanh(6), nn.Parameter(torch.ones(())), skip

    def forward(self, h):
        return self.skip(self, h) + self.f(h)


SKIPS = {
    "learned": lambda layer, h: layer.s * h,
    "dropout": lambda layer, h: nn.functional.dropout(layer.s * h, 0.2, layer.training),
    "almost": lambda layer, h: 0.985 * layer.s.detach().sqrt() * layer.s.sqrt() * h,
}


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_a_skip_that_no_carry_states_costs_no_exactness(skip):
    torch.manual_seed(0)
    layers = nn.Sequential(*(Skip(skip) for _ in range(4)))
    assert_as_in_sequence(layers.eval())
    with torch.no_grad():
        [layer.s.mul_(0.5) for layer in layers]
    assert_as_in_sequence(layers.train())


class StoredGate(Plain):
    def __init__(self):
        super().__init__(tanh(6))
        self.gates = nn.Linear(6, 6)

    def r(self, h, z):
        gate = self.gates(h).sigmoid()
        self.gate = gate.detach()
        return gate * h + z

    def carry(self, h_in, h_out):
        return self.gate


class WrongCarry(Gated):
    def carry(self, h_in, h_out):
        return 2 * self.factor().detach()


class SumWithCarry(Sum):
    def carry(self, h_in, h_out):
        return 0.3


@pytest.mark.parametrize("kind", [StoredGate, WrongCarry, SumWithCarry])
def test_a_wrong_carry_costs_no_exactness(kind):
    torch.manual_seed(0)
    plain = nn.Sequential(*(kind() for _ in range(3))).double()
    x, found = rows().requires_grad_(), []
    for model in (plain, hb.ResidualChain(plain, EXACT)):
        losses = [model(c * x).square().sum() for c in (1, 2)]  # the carry is that of the second
        found.append(torch.autograd.grad(sum(losses), [x, *plain.parameters()]))
    torch.testing.assert_close(*found)


class Apart(hb.ResidualLayer):
    """A block that does not depend on h; ``of`` makes it of h and the weights."""

    def __init__(self, of):
        super().__init__()
        self.p, self.of = nn.Parameter(torch.randn(3, dtype=torch.float64)), of

    def block(self, h):
        return self.of(h, self.p)


APART = {
    "zeros": lambda h, p: torch.zeros_like(h),
    "without gradient": lambda h, p: (h * p).detach(),
    "of weights": lambda h, p: (h.detach() * p).tanh(),
}


FOR_THREE = [hb.FixedPoint(3), hb.Highway(3), hb.Highway(2, group_size=2)]


@pytest.mark.parametrize("of", APART.values(), ids=APART)
@pytest.mark.parametrize("method", FOR_THREE, ids=str)
def test_a_block_that_does_not_depend_on_its_input(of, method):
    torch.manual_seed(0)
    model = hb.ResidualChain([Plain(linear(3)), Apart(of), Apart(of)]).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def found(method):
        model.method = method
        states = model(x, return_states=True)
        for state in states:
            state.retain_grad()
        asked = torch.autograd.grad(states[-1].square().sum(), [x], retain_graph=True)
        kept = [state.grad for state in states[:-1]]
        model.zero_grad()
        states[-1].square().sum().backward()
        return [*asked, *kept, *(p.grad for p in model.parameters())]

    for ours, exact in zip(found(method), found(hb.Backprop()), strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(ours, exact)
