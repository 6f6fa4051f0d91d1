"""Two replicas of a model on two processes each against one process, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import highway_bp as hb
from models.decoder import Decoder
from tests.highway_bp import hub_models
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded import InGroups
from tests.highway_bp.test_sharded_training import losses

METHODS = [hb.Backprop(), hb.Highway(0), hb.Highway(1)]


def decoder() -> tuple[nn.Module, list[int]]:
    """A model and the chain's layers per process."""
    torch.manual_seed(0)
    return Decoder(vocabulary=hub_models.V, layers=3, hidden=8, heads=2, length=6).double(), [4, 2]


class Llama(nn.Module):
    """With a mask of its own for every example: the last tokens of some are left out."""

    def __init__(self):
        super().__init__()
        self.inside = hb.convert(hub_models.decoder("Llama", 3).double(), hb.Backprop())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(x.shape[1]) < 3 + x[:, :1] % 4
        return self.inside(input_ids=x, attention_mask=mask.long()).logits


def llama() -> tuple[nn.Module, list[int]]:
    torch.manual_seed(0)
    return Llama(), [4, 2]


MODELS = {"decoder": decoder, "llama": llama}


def batch() -> torch.Tensor:
    return torch.randint(hub_models.V, (8, 6), generator=torch.Generator().manual_seed(1))


def next_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.roll(-1, 1)


def on_four(rank: int) -> tuple[dict[str, tuple], list]:
    """Of every model, method and cut: losses and norms, weights; then the chains' gammas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layers"))
    part = batch().chunk(2)[mesh["data"].get_local_rank()]
    found = {}
    for name, make in MODELS.items():
        for method in METHODS:
            for micro_batches in (1, 2):
                model, _ = make()
                hb.set_method(model, method)
                hb.shard(model, mesh["layers"].get_group(), micro_batches=micro_batches)
                trained = hb.replicate(model, mesh["data"].get_group())
                numbers = torch.tensor(
                    losses(model, trained, part, next_tokens(part)), dtype=torch.float64
                )
                dist.all_reduce(numbers)
                state = hb.whole_state_dict(model)
                found[f"{name} {method} {micro_batches}"] = numbers / 4, state
    model, _ = decoder()
    hb.set_method(model, hb.Highway(0, gamma="auto"))
    hb.shard(model, mesh["layers"].get_group())
    losses(model, hb.replicate(model, mesh["data"].get_group()), part, next_tokens(part))
    return found, hb.method_state(model)


def test_replicas_of_a_sharded_model_train_as_one_process(tmp_path):
    found, gammas = zip(*on_ranks(4, on_four, tmp_path), strict=True)
    assert gammas == gammas[:1] * 4  # or a resumed run would not be the same
    for name, make in MODELS.items():
        for method in METHODS:
            model, sizes = make()
            exact = isinstance(method, hb.Backprop)
            hb.set_method(model, method if exact else InGroups(method, sizes))
            expected = losses(model, model, batch(), next_tokens(batch()))
            for micro_batches in (1, 2):
                for rank, of_rank in enumerate(found):
                    numbers, weights = of_rank[f"{name} {method} {micro_batches}"]
                    assert numbers.tolist() == pytest.approx(expected, rel=1e-9)
                    whole = model.state_dict()  # the first of a replica has all of it
                    assert rank % 2 or weights.keys() == whole.keys()
                    for key, value in weights.items():
                        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-8)
