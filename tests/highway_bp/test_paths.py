"""Every gradient of the library against the sum over paths, on the zoo of architectures."""

from functools import cache

import pytest
import torch
from torch import Tensor

import highway_bp as hb
from tests.highway_bp import oracle
from tests.highway_bp.architectures import ARCHITECTURES, Architecture, build

TOLERANCE = 1e-10

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
both_losses = pytest.mark.parametrize("losses", ["final", "all"])


def loss_of(losses: str, states: list[Tensor]) -> Tensor:
    """A loss on the last state, or one on every state; not linear, so that b depends on h."""
    used = states[-1:] if losses == "final" else states
    return sum(
        ((i + 1.3) * torch.sin(h + 0.1 * i)).sum() + (h**2).sum() for i, h in enumerate(used)
    )


class Reference:
    """An architecture's dense Jacobians and cotangents, made once."""

    def __init__(self, name: str) -> None:
        self.architecture = build(name)
        a = self.architecture
        self.chain = oracle.DenseChain(a.layers, a.x, a.args, a.kwargs)
        self.J, self.K = self.chain.J, self.chain.K
        self.b = {
            losses: self.chain.cotangents(lambda states, losses=losses: loss_of(losses, states))
            for losses in ("final", "all")
        }
        self.L = len(a.layers)

    def gradients(self, w: list[Tensor]) -> list[Tensor]:
        """The leaves' gradients, then x's."""
        x = self.architecture.x
        found = self.chain.leaf_gradients(w, self.architecture.leaves)
        return [*found, *([w[0].reshape(x.shape)] if self.architecture.x_requires_grad else [])]


@cache
def reference(name: str) -> Reference:
    return Reference(name)


def or_zeros(gradients, leaves) -> list[Tensor]:
    """No gradient counts as zero: a method may leave out what it knows to be zero."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def gradients_by(name: str, run, losses: str) -> list[Tensor]:
    """The leaves' gradients, then x's, where ``run`` gives an architecture's states from x."""
    a = build(name)
    x = a.x.detach().requires_grad_(a.x_requires_grad)
    leaves = [*a.leaves, *([x] if a.x_requires_grad else [])]
    loss_of(losses, run(a, x)).backward()
    return or_zeros([t.grad for t in leaves], leaves)


def chain_and_gradients(name: str, method, losses: str) -> tuple[hb.ResidualChain, list[Tensor]]:
    chain = hb.ResidualChain([], method)

    def run(a: Architecture, x: Tensor) -> list[Tensor]:
        chain.extend(a.layers)
        if losses == "final":
            return [chain(x, *a.args, **a.kwargs)]
        return chain(x, *a.args, return_states=True, **a.kwargs)

    return chain, gradients_by(name, run, losses)


def library_gradients(name: str, method, losses: str) -> list[Tensor]:
    return chain_and_gradients(name, method, losses)[1]


def one_after_the_other(a: Architecture, x: Tensor) -> list[Tensor]:
    states = [x]
    for layer in a.layers:
        states.append(layer(states[-1], *a.args, **a.kwargs))
    return states[1:]


def assert_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert expected, "the architecture has nothing to differentiate"
    for n, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape and f.dtype == e.dtype
        error = (f - e).norm().item()
        assert error <= TOLERANCE * e.norm().item() + 1e-14, (
            f"{what}, leaf {n}: |error| {error:.2e}, |expected| {e.norm().item():.2e}"
        )


@every_architecture
@both_losses
def test_all_paths_together_are_autograd(name, losses):
    """In the oracle and by Backprop."""
    ref, exact = reference(name), gradients_by(name, one_after_the_other, losses)
    w = oracle.highway(ref.J, ref.K, ref.b[losses], ref.L)
    assert_equal(ref.gradients(w), exact, "oracle, k = L")
    assert_equal(library_gradients(name, hb.Backprop(), losses), exact, "Backprop")


SETTINGS = [  # gamma moves part of the carry into the block; groups are exact inside
    *(dict(gamma=gamma) for gamma in (0.0, 0.3, 1.0)),
    *(dict(size=2), dict(size=3), dict(gamma=0.3, size=2)),
    *(dict(fixed=True), dict(fixed=True, size=2)),
]


def method_of(k: int, gamma: float = 0.0, size: int = 1, fixed: bool = False) -> hb.Method:
    return hb.FixedPoint(k, group_size=size) if fixed else hb.Highway(k, gamma, size)


@every_architecture
@both_losses
def test_a_gradient_is_the_sum_over_its_methods_paths(name, losses):
    """Of Highway, through at most k blocks, of FixedPoint through at most k layers; for every k."""
    ref = reference(name)
    for setting in SETTINGS:
        groups = -(-ref.L // setting.get("size", 1))
        for k in range(groups + 1):
            w = oracle.solution(ref.J, ref.K, ref.b[losses], k, **setting)
            method = method_of(k, **setting)
            found = library_gradients(name, method, losses)
            assert_equal(found, ref.gradients(w), str(method))
