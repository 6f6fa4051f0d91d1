"""Whole models trained by two processes, step by step against one with the same groups."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import highway_bp as hb
from models.decoder import Decoder
from models.resnet import ResNet
from tests.highway_bp import hub_models
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded import InGroups

STEPS = 4


def gpt() -> tuple[nn.Module, list[int], torch.Tensor, torch.Tensor]:
    """Model, sublayers per process, input, target; embedding and classifier are tied."""
    torch.manual_seed(0)
    model = Decoder(vocabulary=17, layers=3, hidden=8, heads=2, length=6).double()
    x = torch.randint(17, (4, 6))
    return model, [4, 2], x, x.roll(-1, 1)


def resnet() -> tuple[nn.Module, list[int], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = ResNet(depth=14, classes=3, preact=True).double()
    return model, [3, 3], torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4) % 3


class Convolution(nn.Module):
    """h + conv(h)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + torch.tanh(self.body(h))


def two_chains() -> tuple[nn.Module, list[int], torch.Tensor, torch.Tensor]:
    """In channels-last memory, with a layer in between that all processes have."""
    torch.manual_seed(0)
    chains = [hb.ResidualChain(Convolution() for _ in range(3)) for _ in range(2)]
    between = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(
        between[0], chains[0], between[1], chains[1], nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), [2, 1], x, torch.arange(4)


MODELS = {"gpt": gpt, "resnet": resnet, "two chains": two_chains}
METHODS = [hb.Backprop(), hb.Highway(0), hb.Highway(1)]


def losses(model: nn.Module, trained: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Of STEPS steps of AdamW with a clipped gradient, each followed by its norm.

    ``trained`` is called in the model's place: itself, or a wrapper of it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = F.cross_entropy(trained(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = hb.total_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        found += [loss.item(), norm.item()]
    return found


def on_two(rank: int) -> dict[str, tuple]:
    """Of every model and method: layers here, which ones have weights, numbers, all weights."""
    found = {}
    for name, make in MODELS.items():
        for method in METHODS:
            model, _, x, y = make()
            hb.set_method(model, method)
            chain, *_ = hb.shard(model)
            numbers = losses(model, model, x, y)
            state = copy.deepcopy(hb.whole_state_dict(model))  # the evaluation changes statistics
            here = [
                i for i, layer in enumerate(chain) if not any(p.is_meta for p in layer.parameters())
            ]
            found[f"{name} {method}"] = list(chain.own), here, numbers, state
            with torch.no_grad():  # evaluation goes through both processes, too
                assert model(x).isfinite().all()
    return found


def test_two_processes_train_as_one_with_their_groups(tmp_path):
    found = on_ranks(2, on_two, tmp_path)
    for name, make in MODELS.items():
        for method in METHODS:
            model, sizes, x, y = make()
            exact = isinstance(method, hb.Backprop)
            hb.set_method(model, method if exact else InGroups(method, sizes))
            expected, key = losses(model, model, x, y), f"{name} {method}"
            for rank in range(2):
                own, here, numbers, _ = found[rank][key]
                assert len(own) == sizes[rank] and here == own
                assert numbers == pytest.approx(expected, rel=1e-9)
            trained = found[0][key][-1]
            for parameter, value in model.state_dict().items():
                torch.testing.assert_close(trained[parameter], value, rtol=1e-7, atol=1e-9)


def forward_alone(rank: int) -> tuple[bool, float, bool]:
    """Whether a batch smaller than the micro-batches went through; the next random number; whether
    a graph without a backward pass has gone with its output."""
    torch.manual_seed(0)
    layers = [nn.Sequential(Convolution(), nn.Dropout(0.5)) for _ in range(3)]
    chain = hb.ShardedChain(layers, hb.Highway(0), micro_batches=4)
    with torch.no_grad():
        fine = bool(chain(torch.randn(2, 4, 5, 5)).isfinite().all())
    drawn = torch.rand(()).item()  # dropout has drawn for own layers alone
    h = chain(torch.randn(4, 4, 5, 5))
    gone = weakref.ref(h.grad_fn)
    gc.disable()
    del h
    return fine, drawn, gone() is None


def test_a_forward_pass_alone_leaves_nothing_behind(tmp_path):
    (fine, drawn, gone), other = on_ranks(2, forward_alone, tmp_path)
    assert fine and gone and other == (fine, drawn, gone)


def nothing_to_train(rank: int) -> tuple[bool, bool]:
    """Whether `replicate` has left the model alone, and whether its second layer has a gradient."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "layers"))
    torch.manual_seed(0)
    model = nn.Sequential(hb.ResidualChain((Convolution() for _ in range(2)), hb.Highway(0)))
    model[0][0].requires_grad_(False)
    hb.shard(model, mesh["layers"].get_group())
    trained = hb.replicate(model, mesh["data"].get_group())
    trained(torch.randn(2, 4, 5, 5)).square().mean().backward()
    return trained is model, model[0][1].body.weight.grad is not None


def test_a_process_without_anything_to_train_is_not_wrapped(tmp_path):
    assert on_ranks(2, nothing_to_train, tmp_path) == [(True, False), (False, True)]


def test_recurrent_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="GRU has time steps, not layers of its own"):
        hb.shard(hb.GRU(3, 4))


def test_without_processes_there_is_a_clear_line():
    with pytest.raises(RuntimeError, match="started by torchrun"):
        hb.ShardedChain([nn.Identity()])


def test_a_key_value_cache_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = hb.convert(hub_models.gpt2(3), hb.Highway(1))
        hb.shard(model)
        x = torch.arange(5)[None]
        assert model(x).logits.requires_grad  # while training, it is left out
        with torch.no_grad(), pytest.raises(RuntimeError, match="expected use_cache=False"):
            model(x)
        with torch.no_grad():
            assert model(x, use_cache=False).logits.isfinite().all()
    finally:
        dist.destroy_process_group()
