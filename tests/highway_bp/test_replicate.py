"""Two replicas of a model on two processes each against one process, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import highway_bp as hb
from models.decoder import Decoder
from tests.highway_bp import hub_models
from tests.highway_bp.leave import leave
from tests.highway_bp.test_sharded import InGroups

STEPS = 3
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


def losses(model: nn.Module, trained: nn.Module, x: torch.Tensor) -> list[float]:
    """Of STEPS steps of AdamW with a clipped gradient, each followed by its norm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = F.cross_entropy(trained(x).flatten(0, -2), x.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = hb.total_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        found += [loss.item(), norm.item()]
    return found


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
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
                numbers = torch.tensor(losses(model, trained, part), dtype=torch.float64)
                dist.all_reduce(numbers)
                state = hb.whole_state_dict(model)
                found[f"{name} {method} {micro_batches}"] = numbers / 4, state
    model, _ = decoder()
    hb.set_method(model, hb.Highway(0, gamma="auto"))
    hb.shard(model, mesh["layers"].get_group())
    losses(model, hb.replicate(model, mesh["data"].get_group()), part)
    gammas = [None] * 4
    dist.all_gather_object(gammas, hb.method_state(model))
    assert all(g == gammas[0] for g in gammas)  # or a resumed run would not be the same
    torch.save(found, folder / f"{rank}.pt")
    leave()


def test_replicas_of_a_sharded_model_train_as_one_process(tmp_path):
    mp.spawn(process, (tmp_path,), nprocs=4)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for name, make in MODELS.items():
        for method in METHODS:
            model, sizes = make()
            exact = isinstance(method, hb.Backprop)
            hb.set_method(model, method if exact else InGroups(method, sizes))
            expected = losses(model, model, batch())
            for micro_batches in (1, 2):
                for rank, of_rank in enumerate(found):
                    numbers, weights = of_rank[f"{name} {method} {micro_batches}"]
                    assert numbers.tolist() == pytest.approx(expected, rel=1e-9)
                    whole = model.state_dict()  # the first of a replica has all of it
                    assert rank % 2 or weights.keys() == whole.keys()
                    for key, value in weights.items():
                        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-8)
