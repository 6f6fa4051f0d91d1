"""Weights of a sharded model: each process keeps its own, a checkpoint has all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import highway_bp as hb
from tests.highway_bp import hub_models
from tests.highway_bp.leave import leave
from tests.highway_bp.test_sharded import Relu


class Net(nn.Module):
    """A chain of four layers between two others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.chain = hb.ResidualChain((Relu(8) for _ in range(4)), hb.Highway(1))

    def forward(self, x):
        return self.last(self.chain(self.first(x)))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return hb.convert(hub_models.encoder("Bert", 4), hb.Highway(1))


def bytes_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.is_meta)


def process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for make in (Net, bert):
        whole, model = make(), make()
        outside = bytes_of(model) - sum(p.nbytes for p in layers(model).parameters())
        hb.shard(model)
        assert bytes_of(model) - outside == (bytes_of(whole) - outside) / 2
        assert [p.shape for p in model.parameters()] == [p.shape for p in whole.parameters()]
        state = hb.whole_state_dict(model)
        expected = whole.state_dict()
        if rank == 0:
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        # another training goes on from a whole checkpoint, in shares of its own
        again = make()
        hb.shard(again, sizes=[1, 3])
        other = {name: t + 1 if t.is_floating_point() else t for name, t in expected.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hb.load_whole_state_dict(again, other)
        state = hb.whole_state_dict(again)
        assert all(torch.equal(t, other[name]) for name, t in state.items())
        assert rank or list(state) == list(expected)
    net = Net()
    with torch.no_grad():
        net.chain[2].body.bias += rank
    with pytest.raises(ValueError, match=r"different models, first in chain\.2\.body\.bias;"):
        hb.shard(net)
    net = Net()
    net.chain[3].body.weight = net.chain[0].body.weight
    with pytest.raises(ValueError, match=r"chain.0.body.weight = chain.3.body.weight is shared"):
        hb.shard(net)
    net = Net()
    net.chain[3].body.weight = net.first.weight
    with pytest.raises(ValueError, match=r"first.weight = chain.3.body.weight is shared by"):
        hb.shard(net)
    net = Net()
    net.chain[1].body.weight = net.chain[0].body.weight  # of one process
    hb.shard(net)
    (folder / f"{rank}.txt").write_text("all well")
    leave()


def layers(model: nn.Module) -> nn.Module:
    return model.chain if isinstance(model, Net) else model.bert.encoder.layer


def test_each_process_has_its_own_weights_and_a_checkpoint_has_all(tmp_path):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    mp.spawn(process, (tmp_path,), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["all well"] * 2


def test_a_model_of_one_process_has_its_state_dict():
    net = Net()
    state = hb.whole_state_dict(net)
    assert list(state) == list(net.state_dict())
    assert not any(t.requires_grad for t in state.values())
