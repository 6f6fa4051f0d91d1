"""Errors of gradients on two processes: the same on both, and those of one with the same groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import highway_bp as hb
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded_training import gpt, resnet

LAYERS = ["transformer.h.0.", "transformer.h.1.", "transformer.h.2."]  # two on the first process


def trained(*parts: str) -> Callable:
    """The GPT of which those parts alone are trained: a process may have none of them."""

    def make():
        model, *rest = gpt()
        for name, p in model.named_parameters():
            p.requires_grad = any(part in name for part in parts)
        return model, *rest

    return make


# model, gamma
CASES = {
    "gpt": (gpt, 0.1),
    "resnet": (resnet, 0.0),
    "gammas": (gpt, "auto"),
    "first": (trained(*LAYERS[:2]), 0.0),
    "last": (trained(LAYERS[2]), 0.0),
}


def loss_of(x: torch.Tensor, y: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def errors(model: nn.Module, x, y, method: hb.Highway) -> list[dict]:
    """Errors at k = 0 and 1, in a model that has trained one step and is as it was afterwards."""
    hb.set_method(model, method)
    loss_of(x, y)(model).backward()
    before = trace(model)
    found = [asdict(e) for e in hb.gradient_error(model, loss_of(x, y), (0, 1), method)]
    for a, b in zip(before, trace(model), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [*found, hb.method_state(model)]


def trace(model: nn.Module) -> list:
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    buffers = [b.clone() for b in model.buffers() if not b.is_meta]
    return [
        *gradients,
        *buffers,
        torch.get_rng_state(),
        hb.method_state(model),
        hb.current_method(model),
    ]


def adaptive_ks(model: nn.Module, x, y, method: hb.Highway) -> list:
    """The k of every step (-1: exact), and the error that was last measured."""
    schedule = hb.schedules.Adaptive(method, tolerance=0.01, ks=(0, 1), budget=0.9, exact_from=0.9)
    optimizer, ks, steps = torch.optim.SGD(model.parameters(), lr=0.5), [], 16
    for step in range(steps):
        chosen = schedule.method_for(
            step, steps, lambda m, ks: hb.gradient_error(model, loss_of(x, y), ks, m)
        )
        ks.append(getattr(chosen, "k", -1))
        hb.set_method(model, chosen)
        optimizer.zero_grad()
        loss_of(x, y)(model).backward()
        optimizer.step()
    return [ks, schedule.state_dict()["errors"]]


def on_two(rank: int) -> str:
    """Errors of every case, and the k's of an adaptive schedule, as JSON."""
    found = {}
    for name, (make, gamma) in CASES.items():
        model, _, x, y = make()
        hb.shard(model)
        found[name] = errors(model, x, y, hb.Highway(1, gamma))
    model, _, x, y = gpt()
    hb.shard(model)
    found["ks"] = adaptive_ks(model, x, y, hb.Highway(0))
    with pytest.raises(ValueError, match="advise measures one process"):
        hb.advise(model, None, lambda model, _: loss_of(x, y)(model))
    return json.dumps(found)


def assert_close(found, expected) -> None:
    """Nested lists and dicts of numbers."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_two_processes_find_the_errors_of_one_with_their_groups(tmp_path):
    first, second = on_ranks(2, on_two, tmp_path)
    assert first == second
    found = json.loads(first)
    for name, (make, gamma) in CASES.items():
        model, sizes, x, y = make()
        expected = errors(model, x, y, hb.Highway(1, gamma, group_size=sizes[0]))
        assert expected[0]["relative_error"] > 0.01 or name == "last"  # its groups are exact
        assert_close(found[name], expected)
    model, sizes, x, y = gpt()
    expected = adaptive_ks(model, x, y, hb.Highway(0, group_size=sizes[0]))
    assert {0, 1, -1} == set(expected[0])
    assert_close(found["ks"], expected)
