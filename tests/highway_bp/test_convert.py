"""What people do with models, done with converted ones: the right value, or one clear line."""

import copy
import gc
import io
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from tests.highway_bp.families import LAYERS, build, call, inputs, losses, tf, torchvision
from tests.highway_bp.on_ranks import on_ranks

EXACT = hb.Highway(99)
IN_GROUPS = hb.Highway(99, group_size=2)
TOKENS = inputs("gpt2")


def logits_loss(model: nn.Module) -> torch.Tensor:
    return model(**TOKENS).loss


def with_states(model: nn.Module):
    return model(**TOKENS, output_hidden_states=True)


def assert_same(run, make=lambda: build("gpt2"), method=EXACT, tolerance=1e-9) -> None:
    """``run(model)`` computes gradients of parameters, and may return other tensors: all are those
    of the untouched model."""
    untouched = make()
    converted = hb.convert(copy.deepcopy(untouched), method)
    results = []
    for model in (untouched, converted):
        torch.manual_seed(1)
        shown = run(model) or []
        results.append((gradients(model), shown))
    (wanted, wanted_shown), (found, shown) = results
    assert found.keys() == wanted.keys() and wanted
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= tolerance * whole, name
    assert len(shown) == len(wanted_shown)
    for a, b in zip(shown, wanted_shown, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- hooks ----------------------------------------------------------------------------------------


def test_a_hook_on_a_parameter_runs_once():
    def halved(model):
        for p in model.parameters():
            p.register_hook(lambda g: g / 2)
        logits_loss(model).backward()

    assert_same(halved)


def test_hooks_of_parameters_outlive_an_error():
    model, seen = hb.convert(build("gpt2"), hb.Highway(1)), []
    p = model.transformer.h[1].mlp.c_fc.weight
    p.register_hook(lambda g: seen.append(1))
    loss = logits_loss(model)
    loss.backward(retain_graph=True)
    failing = model.transformer.wte.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    failing.remove()
    loss.backward()
    assert len(seen) == 3


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
class TestStates:
    def test_retain_grad(self, method):
        def run(model):
            out = with_states(model)
            for h in out.hidden_states:
                h.retain_grad()
            (out.loss + out.hidden_states[2].square().sum()).backward()
            return [h.grad for h in out.hidden_states]

        assert_same(run, method=method)

    def test_hooks_see_the_whole_gradient(self, method):
        def run(model):
            out, seen = with_states(model), []
            for h in out.hidden_states[:-1]:
                h.register_hook(lambda g: seen.append(g.clone()))
            (out.loss + out.hidden_states[2].square().sum()).backward()
            return seen

        assert_same(run, method=method)

    def test_hooks_may_change_it(self, method):
        def run(model):
            out = with_states(model)
            out.hidden_states[2].register_hook(lambda g: g * 0.5)
            out.loss.backward()

        assert_same(run, method=method)

    def test_autograd_grad(self, method):
        def run(model):
            out, parameters = with_states(model), list(model.parameters())
            asked = [*out.hidden_states[:3], *parameters]
            loss = out.loss + out.hidden_states[1].square().sum()
            found = torch.autograd.grad(loss, asked, allow_unused=True)
            for p, g in zip(parameters, found[3:], strict=True):
                p.grad = g
            return found[:3]

        assert_same(run, method=method)

    def test_autograd_grad_of_states_alone(self, method):
        def run(model):
            logits_loss(model).backward()
            out = with_states(model)
            return torch.autograd.grad(out.loss, out.hidden_states[2:3])

        assert_same(run, method=method)

    def test_grad_cam(self, method):
        def run(model):
            seen = []

            def watch(_, __, out):
                h = out if isinstance(out, torch.Tensor) else out[0]
                h.register_hook(lambda g: seen.append(g.clone()))

            model.transformer.h[1].register_forward_hook(watch)
            logits_loss(model).backward()
            return seen

        assert_same(run, method=method)


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
def test_a_second_loss_where_a_hook_was_shown_what_came_from_behind(method):
    def run(model):
        out, seen = with_states(model), []
        out.hidden_states[2].register_hook(lambda g: seen.append(g.clone()))
        out.loss.backward(retain_graph=True)
        out.hidden_states[2].square().sum().backward()
        return seen

    assert_same(run, method=method)


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_retain_grad_inside_layers(method, keep):
    """`keep` also puts a loss on one of them: without retain_graph its graph would be used up."""

    def run(model):
        out = model(**TOKENS, output_attentions=True, output_hidden_states=True)
        for t in out.attentions:
            t.retain_grad()
        seen = []
        if not keep:  # the same pass shows the gradient of a state
            out.hidden_states[1].register_hook(lambda g: seen.append(g.clone()))
        loss = out.loss + (out.attentions[1].square().sum() if keep else 0)
        loss.backward(retain_graph=keep)
        return [*(t.grad for t in out.attentions), *seen]

    assert_same(run, method=method)


@pytest.mark.parametrize("look", ["hook", "retain_grad and a loss"])
def test_a_look_at_the_gradient_inside_a_layer_is_refused_where_it_is_not_whole(look):
    model = hb.convert(build("gpt2"), EXACT)
    out = model(**TOKENS, output_attentions=True)
    weights, loss = out.attentions[1], out.loss
    if look == "hook":
        weights.register_hook(lambda g: None)
    else:
        weights.retain_grad()
        loss = loss + weights.square().sum()
    with pytest.raises(RuntimeError, match=r"on a tensor inside transformer.h.1 \(GPT2Block\)"):
        loss.backward()


def test_module_backward_hooks_of_layers_are_refused():
    model = hb.convert(build("gpt2"), hb.Highway(1))
    model.transformer.h[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"h.1 \(GPT2Block\) has a module backward hook"):
        logits_loss(model)


def test_backward_hooks_of_modules_inside_are_warned_of_once():
    model, seen = hb.convert(build("gpt2"), hb.Highway(1)), []
    model.transformer.h[1].mlp.register_full_backward_hook(lambda *_: seen.append(1))
    with pytest.warns(
        UserWarning, match=r"inside transformer.h.1 \(GPT2Block\) run once per"
    ) as told:
        for _ in range(2):
            logits_loss(model).backward()
    assert len(told) == 1 and len(seen) > 2


# -- layers that show what is inside -------------------------------------------------------------


def rows():
    return torch.arange(30).double().sin().view(5, 6)


class Shows(nn.Module):
    """h + g(seen), with something of the inside kept in ``seen``."""

    def __init__(self):
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def inside(self, h):
        return torch.tanh(self.f(self.norm(h)))

    def forward(self, h):
        self.seen = self.inside(h)
        return h + self.scale.exp() * self.g(self.seen)


class ShowsGate(Shows):
    def forward(self, h):
        self.seen = torch.sigmoid(self.scale)
        return h + self.seen * self.g(self.inside(h))


class ShowsDropped(Shows):
    def inside(self, h):
        return nn.functional.dropout(super().inside(h), training=True)


class ShowsCount(Shows):
    def inside(self, h):
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls * super().inside(h)


class Net(nn.Module):
    """Embedding, layers of one class, head; ``forward`` gives the head's loss."""

    def __init__(self, layer=Shows):
        super().__init__()
        self.emb, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x=None):
        h = self.emb(rows() if x is None else x)
        for block in self.blocks:
            h = block(h)
        return self.head(h).sin().sum()


def made(layer=Shows, net=Net):
    torch.manual_seed(0)
    return net(layer).double()


def seen_in_loss(model, **how):
    loss = model()
    (loss + sum(block.seen.square().sum() for block in model.blocks)).backward(**how)


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
@pytest.mark.parametrize("layer", [Shows, ShowsGate, ShowsDropped])
def test_a_loss_on_what_layers_keep(layer, method):
    """Of states, of weights alone (which uses up a part of the graph), of random numbers."""
    assert_same(lambda model: seen_in_loss(model.eval()), lambda: made(layer), method)


def test_a_look_at_a_state_inside_a_group_with_a_loss_inside_its_layers_is_refused():
    model = hb.convert(build("gpt2"), IN_GROUPS)
    out = model(**TOKENS, output_hidden_states=True, output_attentions=True)
    out.hidden_states[1].retain_grad()
    with pytest.raises(RuntimeError, match=r"inside a group of layers.*expected group_size=1"):
        (out.loss + out.attentions[1].sum()).backward()


def test_a_second_run_that_gives_another_state_is_refused():
    with pytest.raises(RuntimeError, match=r"blocks.0 \(ShowsCount\) was run once more .* another"):
        seen_in_loss(hb.convert(made(ShowsCount), EXACT))
    assert_same(lambda model: seen_in_loss(model, retain_graph=True), lambda: made(ShowsCount))


def test_a_second_run_with_other_weights_is_refused():
    model = hb.convert(made(), EXACT)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, weights) + sum(b.seen.sum() for b in model.blocks)
    with pytest.raises(RuntimeError, match="a weight or its input has been changed since"):
        loss.backward()


# -- layers with a mind of their own --------------------------------------------------------------


def test_a_subclass_with_a_forward_of_its_own():
    def make():
        model = build("gpt2")

        class Scaled(type(model.transformer.h[0])):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 1.5

        for layer in model.transformer.h:
            layer.__class__ = Scaled
        return model

    assert_same(lambda model: logits_loss(model).backward(), make)


def test_a_patched_forward():
    def run(model):
        layer = model.transformer.h[1]
        before = layer.forward
        layer.forward = lambda *args, **kwargs: before(*args, **kwargs) * 1.5
        logits_loss(model).backward()
        with torch.no_grad():
            return [model(**TOKENS).logits]

    assert_same(run)


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


def test_edits_in_a_loop_over_the_layers():
    def run(model):
        torch.manual_seed(2)
        for layer in model.transformer.h:
            assert isinstance(layer, nn.Module) and isinstance(
                layer, tf.models.gpt2.modeling_gpt2.GPT2Block
            )
            layer.mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).double()
        assert len(nn.ModuleList(model.transformer.h[:2])) == 2
        logits_loss(model).backward()

    assert_same(run)


def test_layers_exchanged_and_tied():
    def run(model):
        model.transformer.h[1] = model.transformer.h[0]
        model.transformer.h[2] = copy.deepcopy(model.transformer.h[0])
        model(**TOKENS, use_cache=False).loss.backward()

    assert_same(run)


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


def test_dropout_is_drawn_as_before():
    assert_same(
        lambda model: logits_loss(model).backward(), lambda: build("gpt2", dropout=0.3).train()
    )


def test_a_frozen_bottom_is_left_out():
    def run(model):
        for module in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
            module.requires_grad_(False)
        logits_loss(model).backward()

    assert_same(run)


def test_freezing_between_forward_and_backward():
    def run(model):
        loss = logits_loss(model)
        model.transformer.h[1].requires_grad_(False)
        loss.backward()

    assert_same(run)


def test_a_shallow_copy_in_place_of_a_layer():
    def run(model):
        model.blocks[1] = copy.copy(model.blocks[1])
        model().backward()

    assert_same(run, made)


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

    assert_same(lambda model: model().backward(), lambda: made(net=WithHeads))


# -- other passes ---------------------------------------------------------------------------------


def test_a_second_loss_with_retain_graph():
    def run(model):
        out = with_states(model)
        out.loss.backward(retain_graph=True)
        out.hidden_states[2].square().sum().backward()

    assert_same(run)


def test_attention_twice_with_retain_graph():
    def run(model):
        out = model(**TOKENS, output_attentions=True)
        loss = out.loss + out.attentions[1].square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same(run)


def test_a_third_backward_pass_is_refused():
    model = hb.convert(build("gpt2"), hb.Highway(1))
    loss = with_states(model).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_forward_passes_before_one_backward_pass():
    def run(model):
        other = model(input_ids=TOKENS["input_ids"].flip(0), labels=TOKENS["labels"]).loss
        (logits_loss(model) * other).backward()

    assert_same(run)


def test_prefix_tuning():
    def run(model):
        torch.manual_seed(5)
        cache, prefix = tf.DynamicCache(config=model.config), []
        for i in range(LAYERS):
            pair = [torch.randn(2, 2, 3, 8).double().requires_grad_() for _ in range(2)]
            prefix += pair
            cache.update(*(t * 1 for t in pair), i)
        mask = torch.ones(2, 9)
        model(**TOKENS, past_key_values=cache, attention_mask=mask).loss.backward()
        return [t.grad for t in prefix]

    assert_same(run)


@pytest.mark.parametrize("first_counts", [True, False])
def test_a_prompt_in_two_parts(first_counts):
    def run(model):
        x = TOKENS["input_ids"]
        first = model(input_ids=x[:, :3], use_cache=True)
        cache = first.past_key_values
        loss = model(input_ids=x[:, 3:], past_key_values=cache, labels=x[:, 3:]).loss
        (loss + first.logits.square().mean() * first_counts).backward()

    assert_same(run)


def test_generate_is_as_before():
    model = build("gpt2")
    prompt = TOKENS["input_ids"][:1, :2]
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = model.generate(prompt, **asked)
    hb.convert(model, hb.Highway(1))
    logits_loss(model).backward()
    assert torch.equal(model.generate(prompt, **asked), wanted)


def test_layers_called_one_by_one_and_some_skipped():
    def run(model):
        h = model.transformer.wte(TOKENS["input_ids"])
        for i in (0, 2):
            h = model.transformer.h[i](h)
        h.square().sum().backward()

    assert_same(run)


def test_checkpoint_around_layers():
    def run(model, reentrant=False):
        h = model.transformer.wte(TOKENS["input_ids"])
        for layer in model.transformer.h:
            h = checkpoint(layer, h, use_reentrant=reentrant)
        h.square().sum().backward()

    assert_same(run)
    model = hb.convert(build("gpt2"), hb.Highway(1))
    with pytest.raises(RuntimeError, match="expected use_reentrant=False, or Backprop"):
        run(model, reentrant=True)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="re-entrant checkpointing of a converted model"):
        logits_loss(model)


def test_checkpoint_around_the_model():
    def run(model):
        checkpoint(lambda x: model(x).exp(), torch.eye(6).double(), use_reentrant=False).backward()

    assert_same(run, made)


class HoldsChain(nn.Module):
    """A residual layer with layers of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), nn.ModuleList(Shows() for _ in range(2))

    def forward(self, h):
        z = self.norm(h)
        for layer in self.inner:
            z = layer(z)
        return h + torch.tanh(z)


@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
@pytest.mark.parametrize("leak", [False, True])
def test_chains_inside_the_layers_of_a_chain(method, leak):
    def run(model):
        loss = model()
        if leak:
            loss = loss + sum(layer.inner[1].seen.sum() for layer in model.blocks)
        loss.backward()

    untouched, model = made(HoldsChain), made(HoldsChain)
    inner = [f"blocks.{i}.inner" for i in range(4)]
    hb.convert(model, method, layers=["blocks", *inner])
    outer = hb.convert(made(HoldsChain), method, layers=inner)
    outer.blocks = hb.ResidualChain(outer.blocks, method)
    outer.forward = lambda: outer.head(outer.blocks(outer.emb(rows()))).sin().sum()
    for each in (untouched, model, outer):
        run(each)
    for other in (model, outer):
        found = gradients(other)
        for name, g in gradients(untouched).items():
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "export",
    [
        lambda model, x: torch.export.export(model, (x,)).module(),
        lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
        lambda model, x: torch.fx.symbolic_trace(model),
    ],
    ids=["export", "jit", "fx"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_export(export, grad):
    model = hb.convert(made(), EXACT)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(export(model, rows())(rows()), model(rows()))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_with_checkpointing_a_layer_runs_again_for_every_product(k):
    """Once forward, once for each iteration that reaches it, once for its parameters."""
    model, runs = hb.convert(build("gpt2").train(), hb.Highway(k)), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits_loss(model).backward()  # the first pass also looks for residual connections
    for i, layer in enumerate(model.transformer.h):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    logits_loss(model).backward()
    assert [runs.count(i) for i in range(LAYERS)] == [2 + min(k, LAYERS - i) for i in range(LAYERS)]


def test_functional_call_with_other_weights():
    def run(model):
        weights = {name: p * 1.0 for name, p in model.named_parameters()}
        functional_call(model, weights, args=(), kwargs=TOKENS).loss.backward()

    for _ in range(2):  # the first pass and the next
        assert_same(run)


REFUSED = {
    "create_graph=True through a chain": lambda model: (
        torch.autograd.grad(logits_loss(model), list(model.parameters()), create_graph=True)[0]
        .square()
        .sum()
        .backward()
    ),
    "in a transform of torch.func": lambda model: torch.func.grad(
        lambda weights: functional_call(model, weights, args=(), kwargs=TOKENS).loss
    )(dict(model.named_parameters())),
    "a forward-mode derivative; expected Backprop": lambda model: torch.func.jvp(
        lambda h: model.transformer.h[1](h)[0],
        (torch.randn(2, 3, 16).double(),),
        (torch.randn(2, 3, 16).double(),),
    ),
    "batched gradients": lambda model: torch.autograd.grad(
        model(**TOKENS).logits.flatten()[:3],
        list(model.parameters()),
        torch.eye(3, dtype=torch.float64),
        is_grads_batched=True,
    ),
    "in DataParallel; expected DistributedDataParallel": lambda model: model.transformer.h[
        1
    ]._replicate_for_data_parallel()(torch.randn(2, 3, 16).double().requires_grad_()),
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(line):
    model = hb.convert(build("gpt2"), hb.Highway(1))
    with pytest.raises(RuntimeError, match=line) as error:
        REFUSED[line](model)
    assert "\n" not in str(error.value) and "expected" in str(error.value).replace(
        "use", "expected"
    )


@pytest.mark.slow
def test_fsdp_is_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = hb.convert(build("gpt2"), hb.Highway(1))
        for layer in model.transformer.h:
            fully_shard(layer)
        with pytest.raises(RuntimeError, match="a converted model in FSDP"):
            logits_loss(model)
    finally:
        dist.destroy_process_group()


def through_ddp(rank: int) -> list[torch.Tensor]:
    """The same gradients by DDP around a converted model, each process with half a batch."""
    model = hb.convert(build("gpt2"), EXACT)
    part = {key: t[rank : rank + 1] for key, t in TOKENS.items()}
    wrapped = DistributedDataParallel(model)
    wrapped(**part).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_distributed_data_parallel_is_exact(tmp_path):
    model = build("gpt2")
    logits_loss(model).backward()
    for found in on_ranks(2, through_ddp, tmp_path):
        for p, g in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(g, p.grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_torch_compile_around_the_model(name):
    def run(model):
        torch.compiler.reset()
        losses(name)["logits"](torch.compile(model, backend="eager")).backward()

    assert_same(run, lambda: build(name))


def test_threads_have_passes_of_their_own():
    model = hb.convert(build("gpt2"), hb.Highway(1))
    batches = [{key: t.roll(i, 1) for key, t in TOKENS.items()} for i in range(4)]

    def gradient(batch):
        return torch.autograd.grad(model(**batch).loss, list(model.parameters()))

    wanted, found = [gradient(batch) for batch in batches], {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: gradient(batches[i])}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(wanted):
        assert all(torch.equal(a, b) for a, b in zip(found[i], each, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["backward", "no backward", "error"])
def test_no_tensor_outlives_its_pass(how):
    model, counts = hb.convert(build("gpt2"), hb.Highway(1)), []
    gc.collect()
    gc.disable()  # it would find cycles
    for _ in range(4):
        out = with_states(model)
        if how == "backward":
            out.loss.backward()
        elif how == "error":
            out.hidden_states[1].register_hook(lambda g: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                out.loss.backward()
        del out
        counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    gc.enable()
    assert counts[1:] == counts[1:2] * 3


# -- copies ---------------------------------------------------------------------------------------


def test_copies_and_pickles_train_on_their_own():
    def run(model):
        file = io.BytesIO()
        torch.save(copy.deepcopy(model), file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        logits_loss(other).backward()
        assert not gradients(model)
        logits_loss(model).backward()
        return list(gradients(other).values())

    assert_same(run)


def test_checkpoints_have_the_original_format(tmp_path):
    model = hb.convert(build("gpt2"), hb.Highway(1))
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    saved, read = model.state_dict(), back.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[key], read[key]) for key in saved)


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=32, num_hidden_layers=3, intermediate_size=64)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2))
    hb.convert(model, hb.Highway(k=1))
    rows = [{"input_ids": (torch.arange(12) + i) % 16} for i in range(64)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    how = dict(max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=10)
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(str(tmp_path), **how, **quiet, save_steps=60),
        train_dataset=data,
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < 0.3 < 2 < found[0]
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    out = model.eval().generate(torch.tensor([[3, 4, 5]]), **asked)
    assert out[0].tolist() == list(range(3, 11))
    back = tf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-60")
    assert torch.equal(back.generate(torch.tensor([[3, 4, 5]]), **asked), out)


def batches_of_real_text() -> list[dict[str, torch.Tensor]]:
    """64 sequences of 32 characters of Python's own documentation, below code point 128."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics)).encode("ascii", "ignore")
    rows = torch.tensor(list(text[: 64 * 32])).view(64, 32)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "adaptive"])
def test_a_schedule_in_the_trainer_of_transformers(kind, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, n_embd=32, n_layer=4, n_head=2, n_positions=32)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    hb.convert(model, hb.Highway(0))
    data = batches_of_real_text()
    if kind == "linear":
        callback = hb.trainer_callback(hb.schedules.Linear(hb.Highway(0), 0, 3, exact_from=0.9))
    else:
        batch = torch.stack([row["input_ids"] for row in data[:8]])
        callback = hb.trainer_callback(
            hb.schedules.Adaptive(hb.Highway(0), tolerance=0.2, ks=(0, 1, 2, 3), exact_from=0.9),
            lambda model: model(input_ids=batch, labels=batch).loss,
        )
    how = dict(max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=2)
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    arguments = tf.TrainingArguments(str(tmp_path), **how, **quiet)
    trainer = tf.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    ks = [entry["k"] for entry in log]
    assert ks[-1] == "bp" and hb.current_method(model) == hb.Backprop()
    if kind == "linear":
        assert ks[:-1] == sorted(ks[:-1]) and ks[0] == 0 and ks[-2] == 3
    else:
        assert {*ks[:-1]} & {1, 2, 3}  # no k = 0 once it was measured


def test_gradient_error_goes_to_zero_and_leaves_no_trace():
    model = hb.convert(build("gpt2"), hb.Highway(3, gamma="auto"))
    logits_loss(model).backward()
    before, values = gradients(model), hb.method_state(model)
    errors = hb.gradient_error(model, logits_loss, ks=range(4))
    assert errors[0].relative_error > errors[1].relative_error > 1e-3
    assert errors[3].relative_error < 1e-9 and errors[3].cosine == pytest.approx(1.0)
    assert all(torch.equal(g, before[name]) for name, g in gradients(model).items())
    assert hb.method_state(model) == values
    assert hb.current_method(model) == hb.Highway(3, gamma="auto")
    assert call(model, TOKENS).loss.requires_grad
