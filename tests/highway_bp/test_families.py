"""`hb.convert` on 53 families: exact for every loss once k >= L, and another gradient below."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import relative_error
from tests.highway_bp.families import EXACT_ATTENTION, LAYERS, LENGTHS, MAKERS, build, losses

pytestmark = pytest.mark.filterwarnings("ignore:no layer of wav2vec2.feature_extractor")


def gradients(model: nn.Module, loss, **how: bool) -> list[torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(1)
    loss(model).backward(**how)
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MAKERS)
def test_every_loss_has_the_untouched_models_gradient(name):
    untouched = build(name)
    model = hb.convert(copy.deepcopy(untouched), hb.Highway(99))
    for what, loss in losses(name).items():
        exact = gradients(untouched, loss)
        upcast = what in ("attention", "router") and name not in EXACT_ATTENTION
        upcast |= what == "hooks"  # many normalisations compute in float32
        assert relative_error(gradients(model, loss), exact) < (1e-4 if upcast else 1e-9), what
        if what == "logits":
            hb.set_method(model, hb.Highway(0))
            assert 1e-3 < relative_error(gradients(model, loss), exact) < math.inf
            hb.set_method(model, hb.Highway(99))
    assert [chain.length for chain in hb.chains(model)] == LENGTHS.get(name, [LAYERS])


@pytest.mark.parametrize("name", ["bert", "torchvision resnet18"])
def test_a_second_run_has_the_same_carry(name):
    model, loss = hb.convert(build(name), hb.Highway(1)), losses(name)["hooks"]
    second_run = gradients(model, loss)
    kept_graph = gradients(model, loss, retain_graph=True)
    assert relative_error(second_run, kept_graph) < 1e-9


CHECKPOINTED = [name for name in MAKERS if not name.startswith(("albert", "torchvision"))]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name):
    untouched, loss = build(name).train(), losses(name)["logits"]
    model = hb.convert(copy.deepcopy(untouched), hb.Highway(99))
    for each in (untouched, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache")
        exact = gradients(untouched, loss)
        assert relative_error(gradients(model, loss), exact) < 1e-9
