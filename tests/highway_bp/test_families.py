"""`hb.convert` on 53 families: exact for every loss once k >= L, another gradient below; and for
every kind of trunk the sum over paths."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp import oracle
from tests.highway_bp.converted import assert_same, backward, made, relative_error
from tests.highway_bp.families import (
    EXACT_ATTENTION,
    LAYERS,
    LENGTHS,
    MAKERS,
    MASKED_LM,
    build,
    call,
    inputs,
    losses,
    main_loss,
    torchvision,
)

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


# -- sums over paths ------------------------------------------------------------------------------


class Part:
    """A whole layer for the oracle: f(h) = r(h, g(h))."""

    def __init__(self, g, r):
        self.g, self.r = g, r

    def __call__(self, h):
        return self.r(h, self.g(h))


def pre_ln(f):
    """K = I."""
    return Part(lambda h: f(h) - h, lambda h, z: h + z)


def post_ln(f, norms):
    """K = diag(weight / sigma) of both norms, one after the other (paper, Appendix C.3)."""

    def g(h):
        seen = []
        hooks = [
            norm.register_forward_hook(lambda norm, args, _: seen.append((norm, args[0])))
            for norm in norms
        ]
        out, a = f(h), 1.0
        for hook in hooks:
            hook.remove()
        for norm, u in seen:
            a = a * norm.weight / (u.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return a, out - a * h

    return Part(g, lambda h, z: z[0] * h + z[1])


def residual_block(layer):
    """K = diag(1[out > 0]) S."""

    def body(h):
        z = torch.relu(layer.bn1(layer.conv1(h)))
        return layer.bn2(layer.conv2(z))

    def r(h, z):
        return torch.relu((h if layer.downsample is None else layer.downsample(h)) + z)

    return Part(body, r)


def tiny_resnet():
    torch.manual_seed(0)
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3
    )
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    return model.double().train()


class Dense:
    """The dense Jacobians of a model's trunk, and b: the gradient at its last state."""

    def __init__(self, model, loss, find):
        layers, calls, ends = find(model), [], []

        def note(_, args, kwargs, out):
            calls.append((args, kwargs))
            ends.append(out)

        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        (b_L,) = torch.autograd.grad(loss(model), ends[-1])
        for hook in hooks:
            hook.remove()
        parts = [self.part(layer, *call) for layer, call in zip(layers, calls, strict=True)]
        self.chain = oracle.DenseChain(parts, calls[0][0][0].detach())
        torch.testing.assert_close(self.chain.states[-1], ends[-1].detach(), rtol=1e-10, atol=1e-11)
        zeros = [torch.zeros_like(h).flatten() for h in self.chain.states[:-1]]
        self.b = [*zeros, b_L.flatten()]
        self.leaves = [p for layer in layers for p in layer.parameters()]

    @staticmethod
    def part(layer, args, kwargs):
        if hasattr(layer, "downsample"):
            return residual_block(layer)

        def f(h):
            return layer(h, *args[1:], **kwargs)

        norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
        is_bert = hasattr(layer, "attention") and hasattr(layer, "output") and len(norms) == 2
        is_post_ln = is_bert and not hasattr(layer, "layernorm_before")  # in 5.5 a ViT has both
        return post_ln(f, norms) if is_post_ln else pre_ln(f)

    def gradients(self, method):
        gamma, fixed = getattr(method, "gamma", 0.0), isinstance(method, hb.FixedPoint)
        J, K, size = self.chain.J, self.chain.K, method.group_size
        w = oracle.solution(J, K, self.b, method.k, gamma, size, fixed)
        return self.chain.leaf_gradients(w, self.leaves)


TRUNKS = {
    "gpt2": lambda m: list(m.transformer.h),
    "llama": lambda m: list(m.model.layers),
    "bert": lambda m: list(m.bert.encoder.layer),
    "roberta": lambda m: list(m.roberta.encoder.layer),
    "mamba": lambda m: list(m.backbone.layers),
    "vit": lambda m: list(getattr(m.vit, "layers", ()) or m.vit.encoder.layer),  # in 5.5
    "resnet": lambda m: [m.layer1[0], m.layer2[0]],
}
BELOW_L = [
    hb.Highway(0),
    hb.Highway(1),
    hb.Highway(1, gamma=0.3),
    hb.FixedPoint(1),
    hb.Highway(0, group_size=2),
]


@pytest.mark.parametrize("name", TRUNKS)
def test_below_L_gradients_are_the_sum_over_paths(name):
    if name == "resnet":
        model, given = tiny_resnet(), {"x": torch.randn(3, 3, 4, 4).double()}
    else:
        model, given = build(name), {key: t[:1] for key, t in inputs(name).items()}
        if name not in ("vit", *MASKED_LM):
            given["use_cache"] = False

    def loss(model):
        return main_loss(call(model, given))

    converted = hb.convert(copy.deepcopy(model), hb.Backprop())
    dense = Dense(model, loss, TRUNKS[name])
    leaves = [p for layer in TRUNKS[name](converted) for p in layer.parameters()]
    for method in BELOW_L:
        hb.set_method(converted, method)
        found = torch.autograd.grad(loss(converted), leaves)
        wanted = dense.gradients(method)
        whole = torch.stack([g.norm() for g in wanted]).norm()
        for f, g in zip(found, wanted, strict=True):
            in_float32 = name in ("mamba", "llama", "vit")  # in part
            assert (f - g).norm() < (1e-5 if in_float32 else 1e-9) * whole


class LooksAtPairs(nn.Module):
    """Post-LN, with a norm of other tokens within: those of pairs of rows."""

    def __init__(self):
        super().__init__()
        self.f, self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, h):
        pairs = self.inner(h[:4].unflatten(0, (2, 2)).mean(1))
        return self.norm(h + torch.tanh(self.f(h)) @ pairs.T @ pairs)


def test_norms_of_other_tokens_are_no_part_of_the_carry():
    assert_same(backward, lambda: made(LooksAtPairs))
