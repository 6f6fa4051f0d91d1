"""Replicas of a model on several processes, each with its layers on two, train as one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import highway_bp as hb
from models.pair_classifier import PairClassifier
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded_models import METHODS, Case, gpt, losses, trained_alone

pytestmark = pytest.mark.slow


def roberta() -> Case:
    """With a mask of its own for every example: the last tokens of some are left out."""
    torch.manual_seed(0)
    sizes = dict(layers=3, hidden=8, heads=2, length=6)
    model = PairClassifier(vocabulary=17, padding=1, labels=("a", "b", "c"), **sizes).double()
    x = torch.randint(2, 17, (8, 6))
    mask = torch.arange(6) < 3 + x[:, :1] % 4
    x = torch.stack([x.where(mask, 1), mask.long(), torch.zeros_like(x)], 1)
    return model.eval(), [3, 3], x, torch.arange(8) % 3  # eval: without dropout


CUT = [(gpt, 1), (gpt, 2), (roberta, 2)]  # micro-batches


def on_four(rank: int) -> tuple[list, list]:
    """Of every cut and method losses and norms, and weights; then the chains' gammas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layers"))
    layers, data = mesh["layers"].get_group(), mesh["data"].get_group()
    found = []
    for make, micro_batches in CUT:
        for method in METHODS:
            model, _, x, y = make()
            hb.set_method(model, method)
            hb.shard(model, layers, micro_batches=micro_batches)
            part = [t.chunk(2)[dist.get_rank(data)] for t in (x, y)]
            numbers = losses(model, hb.replicate(model, data), *part)
            numbers = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(numbers)
            found.append((numbers / 4, hb.whole_state_dict(model)))
    model, _, x, y = gpt()
    hb.set_method(model, hb.Highway(0, gamma="auto"))
    hb.shard(model, layers)
    losses(model, hb.replicate(model, data), *(t.chunk(2)[dist.get_rank(data)] for t in (x, y)))
    return found, hb.method_state(model)


def test_replicas_of_a_sharded_model_train_as_one_process(tmp_path):
    found, gammas = zip(*on_ranks(4, on_four, tmp_path), strict=True)
    assert gammas == gammas[:1] * 4  # or a resumed run would not be the same
    cases = [(make, method) for make, _ in CUT for method in METHODS]
    for i, (make, method) in enumerate(cases):
        expected, whole = trained_alone(make, method)
        for rank in range(4):
            numbers, weights = found[rank][i]
            assert numbers.tolist() == pytest.approx(expected, rel=1e-9)
            assert rank % 2 or weights.keys() == whole.keys()  # the first of a replica has all
            for key, value in weights.items():
                torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-8)
