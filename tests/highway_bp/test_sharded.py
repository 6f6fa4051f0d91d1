"""Layers on P processes against the grouped chain in one process, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import highway_bp as hb
from highway_bp.parallel.sharded_chain import ShardedChain
from models.resnet import ResNet
from scripts.transformer_layers import sublayers
from tests.highway_bp.on_ranks import leave, on_ranks

TOLERANCE = 1e-10
METHODS = [
    hb.Backprop(),
    hb.FixedPoint(1),
    hb.TruncatedBPTT(1),
    hb.Highway(0),
    hb.Highway(1),
    hb.Highway(2, gamma=0.3),
    hb.Highway(3, tolerance=0.5),
    hb.Highway(1, gamma="auto"),
]


class Relu(nn.Module):
    """ReLU(h + W h): a diagonal carry."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Linear(width, width)

    def forward(self, h):
        return torch.relu(h + 0.5 * torch.tanh(self.body(h)))

    def carry(self, h_in, h_out):
        return h_out > 0


class Halved(Relu):
    """0.5 h + W h: a number as carry."""

    def forward(self, h):
        return 0.5 * h + torch.tanh(self.body(h))

    def carry(self, h_in, h_out):
        return 0.5


class Turned(Relu):
    """A h + W h: a carry that is no diagonal and cannot be sent."""

    def forward(self, h):
        return h.roll(1, -1) + torch.tanh(self.body(h))

    def carry(self, h_in, h_out):
        return hb.LinearMap(lambda h: h.roll(1, -1), like=h_in)


def layers_of(kind: str) -> list[nn.Module]:
    torch.manual_seed(0)
    if kind == "gpt":
        return [layer.double() for layer in sublayers(6, 8, 2)]
    if kind == "resnet":
        return list(ResNet(depth=14, classes=3, preact=True).double().chain)
    if kind == "mixed":  # one carry that cannot be sent among others
        return [cell(8).double() for cell in (Relu, Halved, Turned, Relu, Halved)]
    return [{"relu": Relu, "halved": Halved, "turned": Turned}[kind](8).double() for _ in range(5)]


KINDS = ["gpt", "relu", "halved", "turned", "mixed", "resnet"]


def data(kind: str):
    generator = torch.Generator().manual_seed(1)
    shape = (3, 16, 8, 8) if kind == "resnet" else (3, 4, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sizes_for(L: int, P: int) -> list[int]:
    return [L // P + (r < L % P) for r in range(P)]


class InGroups:
    """A method in one process, with the groups that P processes would have."""

    def __init__(self, method: hb.Method, sizes: list[int]):
        self.method, self.sizes = method, sizes

    def groups(self, L: int) -> list[range]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def solve(self, system):
        return self.method.solve(system)


def loss_on(states: list) -> torch.Tensor:
    """A loss on every state."""
    return sum((torch.sin(h) + h**2).sum() for h in states)


def expected(kind: str, method: hb.Method, P: int, everywhere: bool) -> dict[str, torch.Tensor]:
    layers = layers_of(kind)
    if not isinstance(method, hb.Backprop):
        method = InGroups(method, sizes_for(len(layers), P))
    chain = hb.ResidualChain(layers, method)
    x = data(kind).requires_grad_()
    states = chain(x, return_states=True)
    loss = loss_on(states if everywhere else states[-1:])
    loss.backward()
    return {"x": x.grad, "loss": loss.detach(), **{n: p.grad for n, p in chain.named_parameters()}}


def found(kind: str, method: hb.Method, everywhere: bool, settings: dict):
    """What this process has: its layers' gradients, and everybody's input's."""
    chain = ShardedChain(layers_of(kind), method, **settings)
    x = data(kind).requires_grad_()
    loss = loss_on(chain(x, return_states=True) if everywhere else [chain(x)])
    loss.backward()
    own = {n: p.grad for n, p in chain.named_parameters() if int(n.split(".")[0]) in chain.own}
    assert len(own) == len(chain.own_parameters())
    return {"x": x.grad, "loss": loss.detach(), **own}


SETTINGS = [{"scan": "sequential"}, {"scan": "doubling"}, {"scan": "gathered"}]
CUT = [{"micro_batches": 2}, {"micro_batches": 3, "scan": "doubling"}]  # of 3 examples


def cases(P: int):
    for kind in KINDS:
        # batch normalisation of a micro-batch is another
        for settings in SETTINGS + (CUT if kind != "resnet" else []):
            for method in METHODS:
                yield kind, method, False, settings
    for method in (hb.Highway(0), hb.Highway(P - 1), hb.Backprop(), hb.FixedPoint(1)):
        for kind in ("gpt", "relu"):
            for settings in SETTINGS + CUT:
                yield kind, method, True, settings
        yield "resnet", method, True, SETTINGS[0]


def compared_with_one(rank: int, P: int) -> tuple[int, list[str]]:
    """All cases: how many tensors were compared, and every difference above TOLERANCE."""
    wrong, compared = [], 0
    for kind, method, everywhere, settings in cases(P):
        if isinstance(method, hb.Highway) and method.k > P:
            continue  # warns
        reference = expected(kind, method, P, everywhere)
        if method == hb.Highway(P - 1):  # exact, but for what lies before the chain
            reference |= {**expected(kind, hb.Backprop(), P, everywhere), "x": reference["x"]}
        for name, value in found(kind, method, everywhere, settings).items():
            compared += 1
            exact = reference[name]
            if (value - exact).abs().max() > TOLERANCE * (1 + exact.abs().max()):
                wrong.append(f"{kind} {method} {settings} {everywhere}: {name} on rank {rank}")
    return compared, wrong


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_every_method_is_that_of_the_grouped_chain(P, tmp_path):
    for compared, wrong in on_ranks(P, compared_with_one, tmp_path, P):
        assert wrong == []
        assert compared > 200


class Masked(Relu):
    """Takes a mask with an entry per example, and a number."""

    def forward(self, h, mask, *, scale):
        return h + scale * mask[:, None, None] * torch.tanh(self.body(h))

    carry = None


def disagreeing(rank: int, folder: Path, differ: str) -> None:
    """What each is told; the one that finds the mistake ends, or the other would wait."""
    torch.manual_seed(0)
    layers = [Masked(8).double() for _ in range(4)]
    chain = ShardedChain(layers, hb.Highway(1), micro_batches=2)
    mask = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    h = chain(data("relu"), mask, scale=0.5)
    whole = hb.ResidualChain(layers)(data("relu"), mask, scale=0.5)
    torch.testing.assert_close(h, whole, rtol=1e-10, atol=1e-10)
    told = []
    try:
        chain(data("relu")[:1], mask, scale=0.5)
    except ValueError as error:
        told.append(str(error))
    chain = ShardedChain(layers, hb.Highway(rank if differ == "method" else 1))
    try:
        with torch.set_grad_enabled(differ == "state"):
            chain(data("relu") + 0.1 * rank, mask, scale=0.5)
    except (ValueError, RuntimeError) as error:
        told.append(str(error))
    leave(folder, rank, told)


@pytest.mark.parametrize("differ", ["method", "state"])
def test_what_processes_disagree_on_is_named(tmp_path, differ):
    told = on_ranks(2, disagreeing, tmp_path, tmp_path, differ)
    assert told[0][0] == told[1][0]
    assert told[0][0].startswith("micro_batches=2 for a state of shape (1, 4, 8); expected at most")
    call = (
        "a state of float64 3 4 8, Highway(k={}, gamma=0.0, group_size=1, tolerance=None), "
        "sizes=[2, 2], micro_batches=1, without gradients"
    )
    if differ == "method":
        assert told[1][1] == (
            f"a ShardedChain called on rank 1 with {call.format(1)}, on rank 0 "
            f"with {call.format(0)}; expected the same"
        )
    else:
        assert told[1][1].startswith("another state enters the ShardedChain on rank 1 than on rank")
    assert "rank 1" not in told[0][1]  # it finds its message not taken


@pytest.mark.parametrize("given", [0, 1.5, True])
def test_micro_batches_are_a_number(given, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises((TypeError, ValueError), match=f"micro_batches={given}; expected"):
            ShardedChain([nn.Identity()], micro_batches=given)
    finally:
        dist.destroy_process_group()


def in_half_precision(rank: int) -> list[float]:
    """Of every gradient the largest error, over its largest entry."""
    errors = []
    for micro_batches in (1, 2):
        torch.manual_seed(0)
        layers = sublayers(6, 8, 2)
        whole = hb.ResidualChain(layers, InGroups(hb.Highway(0), [3, 3]))
        chain = ShardedChain(layers, hb.Highway(0), micro_batches=micro_batches)
        gradients = []
        for each in (whole, chain):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                h = each(data("gpt").float())
            torch.sin(h).sum().backward()
            gradients.append([p.grad.clone() for p in chain.own_parameters()])
        errors += [
            ((found - exact).abs().max() / exact.abs().max()).item()
            for exact, found in zip(*gradients, strict=True)
        ]
    return errors


def test_under_autocast_it_is_the_grouped_chain(tmp_path):
    for errors in on_ranks(2, in_half_precision, tmp_path):
        assert len(errors) > 10 and max(errors) <= 0.03
