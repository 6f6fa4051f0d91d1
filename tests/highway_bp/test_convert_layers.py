"""Layers of people's own making in a converted model: subclasses, patches, adapters, edits."""

import copy
import random
import warnings
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    IN_GROUPS,
    TOKENS,
    Net,
    Shows,
    assert_same,
    asserts_same,
    backward,
    both_methods,
    logits_loss,
    made,
    rows,
)
from tests.highway_bp.families import LAYERS, build, inputs, losses, tf, torchvision


@asserts_same()
def test_a_patched_forward(model):
    layer = model.transformer.h[1]
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs) * 1.5
    logits_loss(model).backward()
    with torch.no_grad():
        return [model(**TOKENS).logits]


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
def test_hooks_on_what_stands_between_two_chains_run_once(at):
    def run(model):
        seen = []
        model.blocks[at] = Scaled(model.blocks[at])

        def hook(module, args, out):
            out.register_hook(lambda g: seen.append(g) or g * 0.5)

        model.blocks[at].register_forward_hook(hook)
        backward(model)
        return seen

    assert_same(run, made)


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


class Writes(Shows):
    """A loss into a list, and what the first layer has made into a dictionary, for all to read."""

    def forward(self, h, losses, shared):
        z = self.inside(h)
        losses.append(z.square().mean())
        shared[0].setdefault("gate", self.scale * h)
        shared[0]["counted"] = 1 + shared[0].get("counted", 0)
        return h + shared[0]["gate"] * self.g(z)


class WithStores(Net):
    store = dict

    def given(self):
        return [], (self.store(),)

    def more(self, losses, shared):
        self.counted, self.losses = shared[0]["counted"], len(losses)
        return 10 * sum(losses)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize(
    ("method", "kind"), [(EXACT, dict), (IN_GROUPS, UserDict), (hb.FixedPoint(99), OrderedDict)]
)
def test_layers_that_write_into_lists_and_dictionaries(method, kind):
    class WithStore(WithStores):
        store = kind

    def run(model):
        loss = model()
        loss.backward()
        assert model.counted == model.losses == 4
        return [loss]

    assert_same(run, lambda: made(Writes, WithStore), method)
    chain, losses, shared = hb.ResidualChain(made(Writes).blocks, method), [], (kind(),)
    h = rows().requires_grad_()
    exact = hb.ResidualChain(made(Writes).blocks)
    (chain(h, losses, shared).sum() + sum(losses)).backward()
    (exact(h, (others := []), ({},)).sum() + sum(others)).backward()
    assert len(losses) == 4 and shared[0]["counted"] == 4
    for p, q in zip(chain.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Pair(NamedTuple):
    scale: torch.Tensor
    mask: torch.Tensor


def test_arguments_in_a_named_tuple():
    class Scales(Shows):
        def forward(self, h, pair):
            return h + pair.scale * pair.mask * self.g(self.inside(h))

    class GivesPair(Net):
        def given(self):
            return (Pair(torch.sigmoid(self.emb(rows())), torch.ones(6).double()),)

    model = assert_same(backward, lambda: made(Scales, GivesPair))
    (chain,) = hb.chains(model)
    assert chain.length == hb.iterations(model) == 4


def test_what_was_written_is_there_once_when_a_layer_has_to_run_again():
    class Both(WithStores):
        def forward(self, x=None):
            loss = super().forward(x)
            return loss + sum(block.seen.sum() for block in self.blocks)

    class Keeps(Writes):
        def inside(self, h):
            self.seen = super().inside(h)
            return self.seen

    def run(model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a new chain begins there")
            model().backward()
        assert model.counted == model.losses == 4

    assert_same(run, lambda: made(Keeps, Both))


class Multiplies(Shows):
    def forward(self, h, c):
        c.mul_(1.5)
        return super().forward(h + c)


class Adds(Shows):
    def forward(self, h, c):
        z = self.inside(h)
        c += z
        return h + self.g(z)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@both_methods
@pytest.mark.parametrize("by", ["a product", "a copy", "a part"])
def test_an_argument_that_the_model_changes_between_two_layers(by, method):
    class Scales(Shows):
        def forward(self, h, c):
            return h + c.sigmoid() * self.g(self.inside(h))

    class Changes(Net):
        def forward(self, x=None):
            h, c = self.emb(rows()), torch.tanh(self.emb(rows())) * 1.0
            for i, block in enumerate(self.blocks):
                h = block(h, c)
                if i == 1 and by == "a product":
                    c.mul_(h + 1.0)
                elif i == 1 and by == "a copy":
                    c.copy_(h.tanh())
                elif by == "a part":
                    c[i] = h[i].tanh()
            return self.head(h).sin().sum()

    assert_same(backward, lambda: made(Scales, Changes), method)


@pytest.mark.parametrize("layer", [Multiplies, Adds])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_an_argument_changed_in_place(layer, wants_gradient):
    class Given(Net):
        def given(self):
            return (torch.tanh(self.emb(rows())) if wants_gradient else torch.zeros(5, 6).double(),)

        def more(self, c):
            return c.sum()

    if layer is Multiplies and not wants_gradient:
        assert_same(backward, lambda: made(layer, Given))
    else:
        told = r"blocks.0 \(\w+\) changes an argument in place, whose"
        with pytest.raises(RuntimeError, match=told):
            backward(hb.convert(made(layer, Given), EXACT))


def test_a_counter_changed_in_place_by_a_layer_that_has_to_run_again_is_refused():
    class Counts(Shows):
        def forward(self, h, count):
            count += 1
            return super().forward(h)

    class Counted(Net):
        def given(self):
            return (torch.zeros(()),)

        def more(self, count):
            assert count == 4
            return sum(block.seen.sum() for block in self.blocks)

    with pytest.raises(RuntimeError, match="changes an argument in place; expected backward"):
        hb.convert(made(Counts, Counted), EXACT)().backward()
    assert_same(lambda model: model().backward(retain_graph=True), lambda: made(Counts, Counted))


def test_a_second_run_that_returns_something_else_beside_the_state_is_refused():
    class Noisy(Shows):
        def forward(self, h):
            return super().forward(h), random.random() * self.seen.sum()

    class Beside(Net):
        def forward(self, x=None):
            h, more = self.emb(rows()), 0.0
            for block in self.blocks:
                h, extra = block(h)
                more = more + extra + block.seen.sum()
            return self.head(h).sum() + more

    with pytest.raises(RuntimeError, match="was run once more for its gradient and gave other"):
        hb.convert(made(Noisy, Beside), EXACT)().backward()


def test_a_buffer_that_is_assigned_anew_counts_one_run():
    class Assigns(Shows):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, h):
            self.steps = self.steps + 1
            return super().forward(h)

    def run(model):
        (model() + sum(block.seen.sum() for block in model.blocks)).backward()
        return [block.steps for block in model.blocks]

    assert_same(run, lambda: made(Assigns))


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
