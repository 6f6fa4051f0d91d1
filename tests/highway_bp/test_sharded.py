"""Layers on P processes against the grouped chain in one process, in float64."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import highway_bp as hb
from highway_bp.parallel.sharded_chain import ShardedChain
from scripts.transformer_layers import sublayers
from tests.highway_bp.leave import leave

TOLERANCE = 1e-10
METHODS = [
    hb.Backprop(), hb.FixedPoint(1), hb.TruncatedBPTT(1), hb.Highway(0), hb.Highway(1),
    hb.Highway(2, gamma=0.3), hb.Highway(3, tolerance=0.5), hb.Highway(1, gamma="auto"),
]  # fmt: skip


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
    if kind == "mixed":  # one carry that cannot be sent among others
        return [cell(8).double() for cell in (Relu, Halved, Turned, Relu, Halved)]
    return [{"relu": Relu, "halved": Halved, "turned": Turned}[kind](8).double() for _ in range(5)]


KINDS = ["gpt", "relu", "halved", "turned", "mixed"]


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)


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
    x = data().requires_grad_()
    states = chain(x, return_states=True)
    loss = loss_on(states if everywhere else states[-1:])
    loss.backward()
    return {"x": x.grad, "loss": loss.detach(), **{n: p.grad for n, p in chain.named_parameters()}}


def found(kind: str, method: hb.Method, scan: str, everywhere: bool) -> dict[str, torch.Tensor]:
    """What this process has: its layers' gradients, and everybody's input's."""
    chain = ShardedChain(layers_of(kind), method, scan=scan)
    x = data().requires_grad_()
    loss = loss_on(chain(x, return_states=True) if everywhere else [chain(x)])
    loss.backward()
    own = {n: p.grad for n, p in chain.named_parameters() if int(n.split(".")[0]) in chain.own}
    assert len(own) == len(chain.own_parameters())
    return {"x": x.grad, "loss": loss.detach(), **own}


def cases(P: int):
    for kind in KINDS:
        for method in METHODS:
            for scan in ("sequential", "doubling", "gathered"):
                yield kind, method, scan, False
    for method in (hb.Highway(0), hb.Highway(P - 1), hb.Backprop(), hb.FixedPoint(1)):
        for kind in ("gpt", "relu"):
            for scan in ("sequential", "doubling", "gathered"):
                yield kind, method, scan, True


def process(rank: int, P: int, folder: Path) -> None:
    """One rank: all cases, every difference above TOLERANCE written down."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=P)
    wrong, compared = [], 0
    for kind, method, scan, everywhere in cases(P):
        if isinstance(method, hb.Highway) and method.k > P:
            continue  # warns
        reference = expected(kind, method, P, everywhere)
        for name, value in found(kind, method, scan, everywhere).items():
            compared += 1
            exact = reference[name]
            if (value - exact).abs().max() > TOLERANCE * (1 + exact.abs().max()):
                wrong.append(f"{kind} {method} {scan} {everywhere}: {name} on rank {rank}")
    (folder / f"{rank}.txt").write_text("\n".join([str(compared), *wrong]))
    leave()


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_every_method_is_that_of_the_grouped_chain(P, tmp_path):
    mp.spawn(process, (P, tmp_path), nprocs=P)
    for rank in range(P):
        compared, *wrong = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert wrong == []
        assert int(compared) > 200
