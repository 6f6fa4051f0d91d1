"""What a ResidualChain and its methods refuse, and what they say."""

import pytest
import torch
from torch import Tensor, nn

import highway_bp as hb
from tests.highway_bp.architectures import Plain, mlp
from tests.highway_bp.test_chain import chain, layers


@pytest.mark.parametrize("make", [hb.Highway, hb.FixedPoint])
@pytest.mark.parametrize(
    "k, error",
    [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_bad_k(make, k, error):
    with pytest.raises(error, match="k") as caught:
        make(k)
    assert repr(k) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "gamma, error",
    [(2.0, ValueError), (-0.1, ValueError), ("a", TypeError), (float("nan"), ValueError)],
)
def test_bad_gamma(gamma, error):
    with pytest.raises(error, match="gamma"):
        hb.Highway(1, gamma=gamma)


@pytest.mark.parametrize("make", [hb.Highway, hb.FixedPoint])
@pytest.mark.parametrize("size, error", [(0, ValueError), (-2, ValueError), (1.5, TypeError)])
def test_bad_group_size(make, size, error):
    with pytest.raises(error, match="group_size"):
        make(1, group_size=size)


def test_one_module_instead_of_a_list():
    with pytest.raises(TypeError, match="layers is Linear; expected a list of modules"):
        hb.ResidualChain(nn.Linear(3, 3), hb.Highway(1))


def test_unknown_method():
    with pytest.raises(TypeError, match="method"):
        hb.ResidualChain(layers(), "highway")
    model = chain()
    with pytest.raises(TypeError, match="method"):
        model.method = 3
    with pytest.raises(TypeError, match="method"):
        hb.set_method(model, hb.Highway)


def run(*modules: nn.Module, method=None, x: Tensor | None = None) -> None:
    """Forward and backward: a mistake may be found in either."""
    model = hb.ResidualChain(modules, method or hb.Highway(1))
    x = torch.randn(3, 4, requires_grad=True) if x is None else x
    model(x).sum().backward()


def test_shape_changed_under_an_identity_carry():
    with pytest.raises(ValueError, match=r"layer 1") as caught:
        run(Plain(mlp()), nn.Linear(4, 6))
    assert "(3, 4)" in str(caught.value) and "(3, 6)" in str(caught.value)


class BadCarry(Plain):
    def __init__(self, carry) -> None:
        super().__init__(mlp())
        self.bad = carry

    def carry(self, h_in, h_out):
        return self.bad


@pytest.mark.parametrize(
    "carry, named",
    [
        (torch.ones(7), r"\(7,\)"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        ("identity", "str"),
        (lambda w: w, "function"),
    ],
    ids=["shape", "rank", "integer", "string", "function"],
)
@pytest.mark.parametrize("split", [False, True])
def test_bad_carry(carry, named, split):
    class SplitBad(BadCarry):
        block, residual = Plain.g, Plain.r

    with pytest.raises((TypeError, ValueError), match=named) as caught:
        run(Plain(mlp()), (SplitBad if split else BadCarry)(carry))
    assert "layer 1" in str(caught.value)


class ReturnsTuple(nn.Module):
    def forward(self, h):
        return h, None


def test_layer_that_returns_a_tuple():
    with pytest.raises(TypeError, match="tuple") as caught:
        run(Plain(mlp()), ReturnsTuple())
    assert "layer 1" in str(caught.value)


def test_a_complex_state():
    with pytest.raises(TypeError, match=r"layer 0 \(Plain\) returned no floating tensor; expected"):
        run(Plain(nn.Linear(4, 4, dtype=torch.cfloat)), x=torch.randn(3, 4, dtype=torch.cfloat))


class Captures(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.held = [tensor]

    def forward(self, h):
        return h + torch.tanh(h * self.held[0])


@pytest.mark.parametrize("leaf", [True, False])
def test_layer_that_captures_a_tensor_with_gradient(leaf):
    tensor = torch.randn(4, requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match="argument"):
        run(Plain(mlp()), Captures(tensor if leaf else tensor * 2))


class Scaled(nn.Module):
    """a h + tanh(W h), split, with a carry that the test gives it."""

    def __init__(self, carry=None):
        super().__init__()
        self.body = nn.Linear(5, 5).double()
        self.a = 0.5
        if carry is not None:
            self.carry = carry

    def block(self, h):
        return torch.tanh(self.body(h))

    def residual(self, h, z):
        return self.a * h + z

    def forward(self, h):
        return self.residual(h, self.block(h))


@pytest.mark.parametrize(
    ("carry", "told"),
    [(None, "it has no carry"), (lambda h_in, h_out: 0.7, "its carry is another")],
)
def test_a_split_layer_with_a_wrong_carry_is_refused(carry, told):
    chain = hb.ResidualChain([Scaled(lambda a, b: 0.5), Scaled(carry)], hb.Highway(2))
    x = torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"layer 1 \(Scaled\): the residual path .* {told}"):
        chain(x)
    chain[1].carry = lambda h_in, h_out: 0.5
    chain(x).sum().backward()
    exact = torch.autograd.grad(nn.Sequential(*chain)(x).sum(), chain[0].body.weight)[0]
    torch.testing.assert_close(chain[0].body.weight.grad, exact)
