"""Weights of a sharded model: each process keeps its own, a checkpoint has all."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp import hub_models
from tests.highway_bp.on_ranks import on_ranks
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


def layers(model: nn.Module) -> nn.Module:
    return model.chain if isinstance(model, Net) else model.bert.encoder.layer


MODELS = (Net, bert)


def shared_and_collected(rank: int) -> list[tuple]:
    """Of every model: bytes of layers, shapes, the whole state; and that of one which has loaded
    another state, in other shares."""
    found = []
    for make in MODELS:
        model = make()
        outside = bytes_of(model) - bytes_of(layers(model))
        hb.shard(model)
        again = make()
        hb.shard(again, sizes=[1, 3])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hb.load_whole_state_dict(again, other(make().state_dict()))
        found.append(
            (
                bytes_of(model) - outside,
                [p.shape for p in model.parameters()],
                hb.whole_state_dict(model),
                hb.whole_state_dict(again),
            )
        )
    return found


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


def test_each_process_has_its_own_weights_and_a_checkpoint_has_all(tmp_path):
    ranks = on_ranks(2, shared_and_collected, tmp_path)
    for i, make in enumerate(MODELS):
        whole = make()
        expected = whole.state_dict()
        for rank, found in enumerate(ranks):
            size, shapes, state, again = found[i]
            assert size == bytes_of(layers(whole)) / 2
            assert shapes == [p.shape for p in whole.parameters()]
            for collected, wanted in ((state, expected), (again, other(expected))):
                assert rank or list(collected) == list(wanted)  # the first one has all
                assert all(torch.equal(t, wanted[name]) for name, t in collected.items())


def tie(net: Net, which: str) -> None:
    if which == "layers of two":
        net.chain[3].body.weight = net.chain[0].body.weight
    elif which == "outside":
        net.chain[3].body.weight = net.first.weight
    else:  # layers of one process
        net.chain[1].body.weight = net.chain[0].body.weight


def refused(rank: int) -> list[str]:
    """What `shard` says of models that cannot be shared out."""
    told = []
    for which in ("weights", "layers of two", "outside", "layers of one"):
        net = Net()
        if which == "weights":
            net.chain[2].body.bias.data += rank
        else:
            tie(net, which)
        try:
            hb.shard(net)
            told.append("nothing")
        except ValueError as error:
            told.append(str(error))
    return told


def test_models_that_cannot_be_shared_out_are_refused(tmp_path):
    first, second = on_ranks(2, refused, tmp_path)
    assert first == second
    weights, two, outside, one = first
    assert weights.startswith("processes have different models, first in chain.2.body.bias; expect")
    assert two.startswith("chain.0.body.weight = chain.3.body.weight is shared by layers of diff")
    assert outside.startswith("first.weight = chain.3.body.weight is shared by")
    assert one == "nothing"


def test_a_model_of_one_process_has_its_state_dict():
    net = Net()
    state = hb.whole_state_dict(net)
    assert list(state) == list(net.state_dict())
    assert not any(t.requires_grad for t in state.values())
