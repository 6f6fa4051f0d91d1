"""CIFAR ResNets: sizes of the paper's Table 2, the split r(h, g(h)), carries, gradients."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from models.resnet import DOWNSAMPLINGS, ResNet

FORMS = pytest.mark.parametrize("preact", [True, False], ids=["preact", "postact"])
KINDS = pytest.mark.parametrize("downsampling", DOWNSAMPLINGS)


def small(preact: bool, downsampling: str) -> ResNet:
    """Depth 8, L = 3: one layer a stage, both changes of stage included; float64."""
    return ResNet(8, preact, classes=5, downsampling=downsampling).double()


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


def gradients(model: ResNet, x: torch.Tensor) -> torch.Tensor:
    """Of a loss, in x and every parameter, in one vector."""
    x = x.clone().requires_grad_()
    labels = torch.arange(len(x)) % 5
    loss = nn.functional.cross_entropy(model(x), labels)
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    return torch.cat([g.flatten() for g in found])


@FORMS
@pytest.mark.parametrize(
    "depth, classes, count", [(32, 10, 464_154), (56, 1000, 917_368), (110, 10, 1_727_962)]
)
@pytest.mark.parametrize("downsampling", ["paper", "shortcut", "strided"])
def test_parameter_counts(preact, depth, classes, count, downsampling):
    with torch.device("meta"):
        model = ResNet(depth, preact, classes, downsampling)
    assert sum(p.numel() for p in model.parameters()) == count


@FORMS
@KINDS
def test_a_layer_is_shortcut_plus_block_and_its_carry_the_jacobian_of_that(preact, downsampling):
    model = small(preact, downsampling)
    h = model.stem(images()).detach()
    for layer in model.chain:
        h_in = h.clone().requires_grad_()
        shortcut = getattr(layer, "shortcut", nn.Identity())
        h_out = shortcut(h_in) + layer.block(h_in).detach()
        h_out = h_out if preact else h_out.relu()
        w = torch.randn_like(h_out)
        (expected,) = torch.autograd.grad(h_out, h_in, w)
        assert torch.equal(h_out, layer(h))
        h = h_out.detach()
        K = layer.carry(h_in.detach(), h) if hasattr(layer, "carry") else hb.Identity()
        assert torch.equal(K.vecmat(w), expected)


@FORMS
@KINDS
def test_every_method_with_enough_iterations_and_no_other_is_autograd(preact, downsampling):
    model, x = small(preact, downsampling), images()
    exact = gradients(model, x)
    L = len(model.chain)
    for method in (hb.Highway(L), hb.Highway(L, gamma=0.3), hb.FixedPoint(L)):
        hb.set_method(model, method)
        error = (gradients(model, x) - exact).norm() / exact.norm()
        assert error < 1e-9, method
    hb.set_method(model, hb.Highway(0))
    assert (gradients(model, x) - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_preact_downsampling_inside_the_shortcut_is_the_same_function(training):
    paper = ResNet(14, preact=True, classes=5, downsampling="paper").double()
    inside = ResNet(14, preact=True, classes=5, downsampling="shortcut").double()
    with torch.no_grad():
        paper(images(4))  # running statistics that are not 0 and 1
    inside.load_state_dict(paper.state_dict())
    paper.train(training)
    inside.train(training)
    x = images(4)
    torch.testing.assert_close(paper(x), inside(x), rtol=1e-10, atol=1e-10)


@FORMS
@KINDS
def test_the_stream_keeps_one_shape_or_halves_at_each_stage(preact, downsampling):
    model = small(preact, downsampling)
    states = model.chain(model.stem(images()), return_states=True)
    keeps, halves = 3 * [(2, 16, 32, 32)], [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    expected = keeps if downsampling in ("paper", "irevnet") else halves
    assert [tuple(h.shape) for h in states] == expected
