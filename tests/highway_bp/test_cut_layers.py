"""`hb.ResidualLayer`: layers whose residual path is cut."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from tests.highway_bp.architectures import Plain, Split, tanh
from tests.highway_bp.converted import EXACT, rows


class Gated(Split, Plain):
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


def in_place(chain, loss):
    with torch.no_grad():
        chain[1].gate.mul_(-1)
    return loss


def evaluating(chain, loss):
    chain.eval()
    return loss


@pytest.mark.parametrize("change", [in_place, evaluating])
def test_a_cut_layer_that_changes_before_backward_is_refused(change):
    torch.manual_seed(0)
    chain = hb.ResidualChain([Gated() for _ in range(3)], EXACT).double()
    loss = change(chain, chain(rows()).sum())
    with pytest.raises(
        RuntimeError, match=r"the carry of layer . \(Gated\) is read in the backward"
    ):
        loss.backward()


def test_cut_layers_inside_a_checkpoint():
    torch.manual_seed(0)
    chain, found = hb.ResidualChain([Gated() for _ in range(3)], EXACT).double(), []
    again = copy.deepcopy(chain)  # not checked yet
    for run in (chain, lambda x: checkpoint(again, x, use_reentrant=False)):
        x = rows().requires_grad_()
        found += torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(*found)


class DropsOut(Gated):
    """Draws random numbers in its residual."""

    def r(self, h, z):
        return super().r(h, nn.functional.dropout(z))


def test_the_checks_of_the_first_pass_draw_no_random_numbers():
    torch.manual_seed(0)
    assert_as_in_sequence(nn.Sequential(*(DropsOut() for _ in range(3))))


class Overridden(Gated):
    def forward(self, h):
        return 3 * super().forward(h)


def test_a_forward_or_hook_of_a_residual_layer_is_not_bypassed():
    torch.manual_seed(0)
    plain = nn.Sequential(Overridden(), Gated(), Gated())
    plain[1].forward = types.MethodType(Overridden.forward, plain[1])
    plain[1].__class__ = Overridden
    plain[2].register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
    assert_as_in_sequence(plain)


class Called(Gated):
    def __call__(self, h):
        return 3 * super().__call__(h)


def test_a_hook_of_all_modules_or_a_call_of_its_own_is_not_bypassed():
    torch.manual_seed(0)
    hook = register_module_forward_hook(lambda m, _, out: 2 * out if isinstance(m, Gated) else out)
    try:
        assert_as_in_sequence(nn.Sequential(Called(), Gated()))
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


class WrongCarry(Gated):
    def carry(self, h_in, h_out):
        return 2 * self.factor().detach()


def test_a_carry_is_checked_when_its_layer_is_first_cut():
    torch.manual_seed(0)
    chain = hb.ResidualChain([WrongCarry(), Gated()], hb.Highway(99, group_size=2)).double()
    chain(rows()).sum().backward()
    chain.method = EXACT
    with pytest.raises(ValueError, match=r"layer 0 \(WrongCarry\): its carry is not the Jacobian"):
        chain(rows())
    chain = hb.ResidualChain([Gated(), Gated()], EXACT).double()
    chain(rows()).sum().backward()
    chain[1] = WrongCarry().double()
    with pytest.raises(ValueError, match=r"layer 1 \(WrongCarry\): its carry is not the Jacobian"):
        chain(rows())
