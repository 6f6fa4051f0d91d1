"""`hb.gradient_error` against its definition, and that it leaves a model as it was."""

import copy

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.diagnostics.gradient_error import layer_name
from tests.highway_bp.converted import gradients
from tests.highway_bp.families import build, losses

RESNET = "torchvision resnet18"


def flat(model: nn.Module, loss_fn, method: hb.Method) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    hb.set_method(model, method)
    loss_fn(model).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_every_score_is_what_it_says():
    model, loss = hb.convert(build("gpt2"), hb.Backprop()), losses("gpt2")["logits"]
    exact = flat(model, loss, hb.Backprop())
    e = torch.cat([g.flatten() for g in exact.values()])
    before = torch.zeros_like(e)
    for found in hb.gradient_error(model, loss, ks=(0, 1, 3), method=hb.Highway(9, gamma=0.1)):
        grads = flat(model, loss, hb.Highway(found.k, gamma=0.1))
        g = torch.cat([grads[n].flatten() for n in exact])
        assert found.cosine == pytest.approx(torch.cosine_similarity(g, e, 0).item(), rel=1e-9)
        assert found.relative_error == pytest.approx(((g - e).norm() / e.norm()).item(), rel=1e-9)
        assert found.increment == pytest.approx(((g - before).norm() / e.norm()).item(), rel=1e-9)
        before = g
        layer = [n for n in exact if n.startswith("transformer.h.1.")]
        g_1, e_1 = (torch.cat([gs[n].flatten() for n in layer]) for gs in (grads, exact))
        assert found.layers["transformer.h.1"] == pytest.approx(
            (torch.cosine_similarity(g_1, e_1, 0).item(), ((g_1 - e_1).norm() / e_1.norm()).item())
        )
    assert found.k == 3 and found.relative_error < 1e-9  # of three layers: exact


LAYER_OF = {
    "transformer.h.3.attn.c_attn.weight": "transformer.h.3",
    **{"0.block.1.weight": "0", "layer1.0.conv1.weight": "layer1.0", "classify.weight": "classify"},
    **{"weight": "", "layers.1.weight_ih_l0": "layers.1", "rnn.weight_ih_l0": "rnn"},
}


def test_layers_are_named_by_their_parameters():
    assert {parameter: layer_name(parameter) for parameter in LAYER_OF} == LAYER_OF


def test_a_model_is_left_as_it_was():
    model, loss = hb.convert(build(RESNET).train(), hb.Highway(1, "auto")), losses(RESNET)["logits"]
    loss(model).backward()

    def tensors():
        every = [*gradients(model).items(), *model.named_buffers(), ("rng", torch.get_rng_state())]
        return {name: t.clone() for name, t in every}

    before, values = tensors(), hb.method_state(model)
    assert any("running_mean" in name for name in before)
    hb.gradient_error(model, loss, ks=(0, 1))
    torch.testing.assert_close(tensors(), before, rtol=0, atol=0)
    assert (hb.method_state(model), hb.current_method(model)) == (values, hb.Highway(1, "auto"))
    assert loss(model).requires_grad


def test_a_method_that_not_all_can_take_is_set_nowhere():
    model = nn.ModuleList([hb.ResidualChain([nn.Linear(2, 2)]), hb.GRU(2, 2)])
    with pytest.raises(ValueError, match="gamma='auto' in a recurrent layer"):
        hb.set_method(model, hb.Highway(1, gamma="auto"))
    assert [m.method for m in model] == [hb.Backprop(), hb.Backprop()]


def test_a_loss_that_fails_leaves_the_method_as_it_was():
    model = hb.convert(build("gpt2"), hb.Highway(2))

    def broken(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hb.gradient_error(model, broken)
    assert hb.current_method(model) == hb.Highway(2)


def test_what_has_no_chain_is_told():
    with pytest.raises(ValueError, match="Linear holds no ResidualChain"):
        hb.gradient_error(nn.Linear(2, 2), lambda m: m(torch.ones(2)).sum())
    with pytest.raises(ValueError, match="ks=-1; expected a whole number"):  # before any pass
        hb.gradient_error(hb.GRU(2, 2), lambda m: 1 / 0, ks=[0, -1])
