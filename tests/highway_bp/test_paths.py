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
        self.J, self.K, self.A = self.chain.J, self.chain.K, self.chain.A
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


def leaves_and_input(a: Architecture) -> tuple[Tensor, list[Tensor]]:
    x = a.x.detach().requires_grad_(a.x_requires_grad)
    return x, [*a.leaves, *([x] if a.x_requires_grad else [])]


def or_zeros(gradients, leaves) -> list[Tensor]:
    """No gradient counts as zero: a method may leave out what it knows to be zero."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def library_gradients(name: str, method, losses: str) -> list[Tensor]:
    return chain_and_gradients(name, method, losses)[1]


def chain_and_gradients(name: str, method, losses: str) -> tuple[hb.ResidualChain, list[Tensor]]:
    a = build(name)
    x, leaves = leaves_and_input(a)
    chain = hb.ResidualChain(a.layers, method)
    if losses == "final":
        states = [chain(x, *a.args, **a.kwargs)]
    else:
        states = chain(x, *a.args, return_states=True, **a.kwargs)
    loss_of(losses, states).backward()
    return chain, or_zeros([t.grad for t in leaves], leaves)


def autograd_gradients(name: str, losses: str) -> list[Tensor]:
    a = build(name)
    x, leaves = leaves_and_input(a)
    states = []
    h = x
    for layer in a.layers:
        h = layer(h, *a.args, **a.kwargs)
        states.append(h)
    loss_of(losses, states).backward()
    return or_zeros([t.grad for t in leaves], leaves)


def assert_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert expected, "the architecture has nothing to differentiate"
    for n, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape and f.dtype == e.dtype
        error = (f - e).norm().item()
        assert error <= TOLERANCE * e.norm().item() + 1e-14, (
            f"{what}, leaf {n}: |error| {error:.2e}, |expected| {e.norm().item():.2e}"
        )


def test_zoo_is_large_and_covers_every_length():
    assert len(ARCHITECTURES) >= 30
    assert {reference(name).L for name in ARCHITECTURES} == {1, 2, 3, 4, 5, 6}


@every_architecture
@both_losses
def test_oracle_with_all_paths_is_autograd(name, losses):
    ref = reference(name)
    w = oracle.highway(ref.J, ref.K, ref.b[losses], ref.L)
    assert_equal(ref.gradients(w), autograd_gradients(name, losses), "oracle, k = L")


@every_architecture
@both_losses
def test_backprop_is_autograd(name, losses):
    found = library_gradients(name, hb.Backprop(), losses)
    assert_equal(found, autograd_gradients(name, losses), "Backprop")


def iterations(ref: Reference, size: int) -> range:
    """Every k up to the number of groups."""
    return range(-(-ref.L // size) + 1)


@every_architecture
@both_losses
@pytest.mark.parametrize(
    ("gamma", "size"), [(0.0, 1), (0.3, 1), (1.0, 1), (0.0, 2), (0.0, 3), (0.3, 2)]
)
def test_highway_is_the_sum_over_paths_with_at_most_k_blocks(name, losses, gamma, size):
    """gamma moves part of the carry into the block; groups are exact inside."""
    ref = reference(name)
    for k in iterations(ref, size):
        w = oracle.solution(ref.J, ref.K, ref.b[losses], k, gamma, size)
        found = library_gradients(name, hb.Highway(k, gamma, size), losses)
        assert_equal(found, ref.gradients(w), f"k = {k}")


@every_architecture
@both_losses
@pytest.mark.parametrize("size", [1, 2])
def test_fixed_point_is_the_sum_over_paths_of_at_most_k_layers(name, losses, size):
    ref = reference(name)
    for k in iterations(ref, size):
        w = oracle.solution(ref.J, ref.K, ref.b[losses], k, size=size, fixed=True)
        found = library_gradients(name, hb.FixedPoint(k, group_size=size), losses)
        assert_equal(found, ref.gradients(w), f"k = {k}")
