"""Passes through a converted model in any order, and what surrounds them: the right value, or one
clear line."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.pipelining._backward import stage_backward_input
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from tests.highway_bp.converted import (
    EXACT,
    TOKENS,
    Shows,
    assert_same,
    asserts_same,
    both_methods,
    gradients,
    logits_loss,
    made,
    refuses,
    rows,
    with_states,
)
from tests.highway_bp.families import LAYERS, build, losses, tf
from tests.highway_bp.on_ranks import on_ranks


@asserts_same()
def test_two_forward_passes_before_one_backward_pass(model):
    other = model(input_ids=TOKENS["input_ids"].flip(0), labels=TOKENS["labels"]).loss
    (logits_loss(model) * other).backward()


def scale_state(_, __, out):
    """A hook between two layers, which breaks the chain."""
    return (1.1 * out[0], *out[1:]) if isinstance(out, tuple) else 1.1 * out


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize("breaks", [False, True])
@asserts_same()
def test_prefix_tuning(model, breaks):
    if breaks:
        model.transformer.h[0].register_forward_hook(scale_state)
    torch.manual_seed(5)
    cache, prefix = tf.DynamicCache(config=model.config), []
    for i in range(LAYERS):
        pair = [torch.randn(2, 2, 3, 8).double().requires_grad_() for _ in range(2)]
        prefix += pair
        cache.update(*(t * 1 for t in pair), i)
    mask = torch.ones(2, 9)
    model(**TOKENS, past_key_values=cache, attention_mask=mask).loss.backward()
    return [t.grad for t in prefix]


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("first_counts", [True, False])
@asserts_same()
def test_a_prompt_in_two_parts(model, first_counts, breaks):
    if breaks:
        model.transformer.h[0].register_forward_hook(scale_state)
    x = TOKENS["input_ids"]
    first = model(input_ids=x[:, :3], use_cache=True)
    cache = first.past_key_values
    loss = model(input_ids=x[:, 3:], past_key_values=cache, labels=x[:, 3:]).loss
    (loss + first.logits.square().mean() * first_counts).backward()


def test_generate_is_as_before():
    model = build("gpt2")
    prompt = TOKENS["input_ids"][:1, :2]
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = model.generate(prompt, **asked)
    hb.convert(model, hb.Highway(1))
    logits_loss(model).backward()
    assert torch.equal(model.generate(prompt, **asked), wanted)


@asserts_same()
def test_layers_called_one_by_one_and_some_skipped(model):
    h = model.transformer.wte(TOKENS["input_ids"])
    for i in (0, 2):
        h = model.transformer.h[i](h)
    h.square().sum().backward()


@asserts_same()
def test_a_hook_that_runs_the_model_and_its_backward_pass(model):
    """GradCache, as in sentence_transformers' cached losses."""

    @torch.enable_grad()
    def second_pass(g):
        (g * logits_loss(model)).backward()

    out = torch.ones((), dtype=torch.float64, requires_grad=True) * 1
    out.register_hook(second_pass)
    out.backward()


@refuses("expected use_reentrant=False, or Backprop", made)
def test_reentrant_checkpointing_around_layers_is_refused(model):
    h = model.emb(rows())
    for block in model.blocks:
        h = checkpoint(block, h, use_reentrant=True)
    h.sum().backward()


class Reentrant(Shows):
    def inside(self, h):
        return checkpoint(super().inside, h, use_reentrant=True)


@refuses(r"inside blocks.0 \(Reentrant\); expected use_reentrant", lambda: made(Reentrant))
def test_reentrant_checkpointing_inside_a_layer_is_refused(model):
    model()


class Normalises(Shows):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)


@pytest.mark.parametrize("k", [0, 1, 99])
def test_checkpointing_updates_statistics_once(k):
    """torch's own updates them twice, once in every run of a layer."""
    model, plain = hb.convert(made(Normalises), hb.Highway(k)), made(Normalises)
    plain().backward()
    h = model.emb(rows())
    for block in model.blocks:
        h = checkpoint(block, h, use_reentrant=False)
    model.head(h).sin().sum().backward()
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@asserts_same(made)
def test_checkpoint_around_the_model(model):
    checkpoint(lambda x: model(x).exp(), torch.eye(6).double(), use_reentrant=False).backward()


class NoNorm(Shows):
    """Begins with a linear layer: autograd saves its weight only if the input needs a gradient."""

    def inside(self, h):
        return torch.tanh(self.f(h))


@pytest.mark.parametrize("layer", [NoNorm, Shows])
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("size", [1, 2])
def test_checkpoint_around_layers_whose_input_needs_no_gradient(size, frozen, layer):
    def run(model):
        model.emb.requires_grad_(False)
        model.blocks[:frozen].requires_grad_(False)
        h = model.emb(rows())
        for i in range(0, 4, size):
            some = nn.Sequential(*model.blocks[i : i + size])
            h = checkpoint(some, h, use_reentrant=False)
        model.head(h).sin().sum().backward()

    assert_same(run, lambda: made(layer))


@asserts_same(made)
def test_checkpoint_around_layers_that_are_checkpointed(model):
    def blocks(h):
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return h

    h = checkpoint(blocks, model.emb(rows()), use_reentrant=False)
    model.head(h).sin().sum().backward()


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


@both_methods
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
        lambda model, x: torch.export.export(model, (x,), strict=True).module(),
        lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
        lambda model, x: torch.fx.symbolic_trace(model),
    ],
    ids=["export", "strict", "jit", "fx"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_export(export, grad):
    model = hb.convert(made(), EXACT)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*outside any chain")
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


@asserts_same()
def test_functional_call_with_other_weights(model):
    for _ in range(2):  # the first pass and the next
        weights = {name: p * 1.0 for name, p in model.named_parameters()}
        functional_call(model, weights, args=(), kwargs=TOKENS).loss.backward()


REFUSED = {
    "create_graph=True through a chain": lambda model: torch.autograd.grad(
        logits_loss(model), list(model.parameters()), create_graph=True
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


def test_a_zero_bubble_pipeline_is_refused():
    """The first part of its backward pass is for inputs alone."""
    model = hb.convert(build("gpt2"), EXACT)
    loss, inputs = logits_loss(model), [model.transformer.wte.weight]
    weights = model.transformer.h.parameters()
    with pytest.raises(RuntimeError, match="Failed to run stage backward input") as error:
        stage_backward_input([loss], [torch.ones_like(loss)], inputs, weights)
    assert "in two parts (a zero-bubble schedule)" in str(error.value.__cause__)


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
    """Its layers are compiled, and a method that is set later holds."""
    torch.compiler.reset()
    model, plain = (hb.convert(build(name), EXACT) for _ in range(2))
    graphs = CompileCounter()
    compiled, loss = torch.compile(model, backend=graphs), losses(name)["logits"]
    for method in (EXACT, hb.Highway(1)):
        hb.set_method(model, method)
        hb.set_method(plain, method)
        for each in (model, plain):
            each.zero_grad()
        loss(compiled).backward()
        loss(plain).backward()
        torch.testing.assert_close(gradients(model), gradients(plain))
    assert graphs.frame_count >= 3  # what is before, in and after the layers


def test_threads_have_passes_of_their_own():
    model = hb.convert(build("gpt2"), hb.Highway(1))
    batches = [{key: t.roll(i, 1) for key, t in TOKENS.items()} for i in range(4)]

    def gradient(batch):
        return torch.autograd.grad(model(**batch).loss, list(model.parameters()))

    wanted = [gradient(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(gradient, batches))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["backward", "no backward", "error"])
@pytest.mark.parametrize("method", [hb.Highway(1), hb.Highway(1, group_size=2)], ids=str)
def test_no_tensor_outlives_its_pass(how, method):
    model, counts = hb.convert(build("gpt2"), method), []
    gc.collect()
    gc.freeze()  # all that is there already needs no counting
    gc.disable()  # it would find cycles
    for _ in range(4):
        out = with_states(model)
        first = out.hidden_states[1]
        out.hidden_states[2].register_hook(lambda g, first=first: None)
        del first
        if how == "backward":
            out.loss.backward()
        elif how == "error":
            out.hidden_states[1].register_hook(lambda g: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                out.loss.backward()
        del out
        counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    gc.enable()
    gc.unfreeze()
    assert counts[1:] == counts[1:2] * 3
