"""Layers of people's own making in a converted model: subclasses, patches, adapters, edits."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.highway_bp.converted import (
    TOKENS,
    Net,
    Shows,
    assert_same,
    asserts_same,
    backward,
    logits_loss,
    made,
    rows,
)
from tests.highway_bp.families import LAYERS, build, inputs, losses, tf, torchvision


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, z):
        return z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))


def test_a_basic_block_with_one_module_more():
    class BasicBlock(torchvision.models.resnet.BasicBlock):
        def forward(self, x):
            if not hasattr(self, "se"):
                return super().forward(x)
            z = self.se(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
            return torch.relu(z + (x if self.downsample is None else self.downsample(x)))

    def make():
        torch.manual_seed(0)
        model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).double()
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage[0].se = SqueezeExcite(stage[0].conv2.out_channels).double()
        return model

    images = inputs("torchvision resnet18")["x"]
    assert_same(lambda model: model(images).sin().sum().backward(), make)


class Scaled(nn.Module):
    """Stands around a layer, and is no layer of the chain."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.by = inner, nn.Parameter(torch.tensor(1.5).double())

    def forward(self, h):
        return self.by * self.inner(h)


@pytest.mark.parametrize("at", range(4))
@asserts_same(made)
def test_hooks_on_what_stands_between_two_chains_run_once(model, at):
    seen = []
    model.blocks[at] = Scaled(model.blocks[at])

    def hook(module, args, out):
        out.register_hook(lambda g: seen.append(g) or g * 0.5)

    model.blocks[at].register_forward_hook(hook)
    backward(model)
    return seen


def test_adapters_and_hooks_inside_bert_layers():
    class Adapted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.down = inner, nn.Linear(16, 16).double()

        def forward(self, *args):
            h = self.inner(*args)
            return h + torch.tanh(self.down(h))

    def run(model):
        torch.manual_seed(2)
        seen = []
        for layer in model.bert.encoder.layer:
            layer.output = Adapted(layer.output)
            layer.attention.register_forward_hook(lambda _, __, out: seen.append(out[0].detach()))
        losses("bert")["logits"](model).backward()
        assert len(seen) == LAYERS
        return seen

    assert_same(run, lambda: build("bert"))


@asserts_same()
def test_edits_in_a_loop_over_the_layers(model):
    torch.manual_seed(2)
    for layer in model.transformer.h:
        assert isinstance(layer, nn.Module) and isinstance(
            layer, tf.models.gpt2.modeling_gpt2.GPT2Block
        )
        layer.mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).double()
    assert len(nn.ModuleList(model.transformer.h[:2])) == 2
    logits_loss(model).backward()


@asserts_same()
def test_layers_exchanged_and_tied(model):
    model.transformer.h[1] = model.transformer.h[0]
    model.transformer.h[2] = copy.deepcopy(model.transformer.h[0])
    model(**TOKENS, use_cache=False).loss.backward()


@pytest.mark.slow
def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            return peft.get_peft_model(model, config).double()

    def run(model):
        logits_loss(adapted(model)).backward()

    assert_same(run)
    assert_same(lambda model: logits_loss(model).backward(), lambda: adapted(build("gpt2")))


@asserts_same()
def test_a_frozen_bottom_is_left_out(model):
    for module in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
        module.requires_grad_(False)
    logits_loss(model).backward()


@asserts_same()
def test_freezing_between_forward_and_backward(model):
    loss = logits_loss(model)
    model.transformer.h[1].requires_grad_(False)
    loss.backward()


@asserts_same(made)
def test_a_shallow_copy_in_place_of_a_layer(model):
    model.blocks[1] = copy.copy(model.blocks[1])
    model().backward()


class Odd(nn.Module):
    """A head that returns no state: nothing of a chain."""

    def __init__(self, returns):
        super().__init__()
        self.norm, self.f, self.returns = nn.LayerNorm(6), nn.Linear(6, 6), returns

    def forward(self, *given, **named):
        (h,) = (*given, *named.values()) or (self.norm.weight,)
        return self.returns(self.f(self.norm(h)))


@pytest.mark.filterwarnings("ignore:no layer of heads")
@pytest.mark.parametrize("given", ["position", "name", "nothing"])
@pytest.mark.parametrize(
    "returns",
    [lambda z: (None, z), lambda z: (z.argmax(-1), z), lambda z: {0: "z", 1: z}],
    ids=["none", "integers", "text"],
)
def test_layers_that_return_no_state_run_as_before(returns, given):
    class WithHeads(Net):
        def __init__(self, layer):
            super().__init__(layer)
            self.heads = nn.ModuleList(Odd(returns) for _ in range(2))

        def forward(self):
            x = self.emb.weight.sin()
            args, kwargs = {"position": ([x], {}), "name": ([], {"x": x}), "nothing": ([], {})}[
                given
            ]
            return super().forward() + sum(head(*args, **kwargs)[1].sum() for head in self.heads)

    assert_same(backward, lambda: made(net=WithHeads))


@pytest.mark.parametrize("give", ["a dictionary", "a name that is not the first"])
def test_a_state_that_is_not_seen_is_warned_of(give):
    class Named(Shows):
        def forward(self, mask=None, h=None):
            if give == "a dictionary":
                return {"h": super().forward(mask["h"])}
            return super().forward(h)

    class Gives(Net):
        def forward(self, x=None):
            h = self.emb(rows())
            for block in self.blocks:
                h = block({"h": h})["h"] if give == "a dictionary" else block(h=h)
            return self.head(h).sum()

    with pytest.warns(
        UserWarning, match=r"blocks.0 \(Named\) does not get a floating tensor"
    ) as told:
        assert_same(backward, lambda: made(Named, Gives))
    assert len(told) == 1
