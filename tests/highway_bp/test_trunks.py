"""`hb.convert` on models of other libraries: exactness, path sums, and all else untouched."""

import copy
import pickle

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.method_state import trunks
from tests.highway_bp import oracle
from tests.highway_bp.hub_models import MAKERS, TRANSFORMERS, Case, build, tf

every_family = pytest.mark.parametrize("name", MAKERS)
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)
METHODS = [
    hb.Highway(99),
    hb.Highway(99, gamma=0.3),
    hb.Highway(99, group_size=3),
    hb.FixedPoint(99),
    hb.Highway(99, gamma="auto"),
]
pytestmark = pytest.mark.filterwarnings("ignore:k=99 is larger than L")


def gradients(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    case.loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, tolerance=1e-9):
    """Relative to each tensor, or to the whole gradient where a tensor's is mathematically 0."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        error = (found[name] - g).norm()
        assert error <= tolerance * max(g.norm(), 1e-3 * whole), (name, error / g.norm())


@every_family
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_logits_loss_and_with_k_at_least_L_gradients_are_the_untouched_models(name, method):
    case = build(name, 4)
    untouched = copy.deepcopy(case.model)
    wanted, logits = gradients(case, untouched), case.logits(untouched)
    hb.convert(case.model, method)
    found = gradients(case, case.model)
    torch.testing.assert_close(case.logits(case.model), logits, rtol=1e-12, atol=1e-13)
    assert_same(found, wanted)
    assert case.model.state_dict().keys() == untouched.state_dict().keys()
    buffers = zip(case.model.buffers(), untouched.buffers(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in buffers)


def test_every_family_has_two_sublayers_a_layer_or_one_per_residual_block():
    for name in MAKERS:
        model = hb.convert(build(name, 4).model, hb.Highway(1))
        L = sum(len(chain) for chain in hb.chains(model))
        assert (8 if name in TRANSFORMERS else 4) == L, name


class Part:
    """A sublayer for the oracle, written from the layer's modules: f(h) = r(h, g(h))."""

    def __init__(self, g, r):
        self.g, self.r = g, r

    def __call__(self, h):
        return self.r(h, self.g(h))


def add(h, z):
    return h + z


def pre_ln(f):
    return Part(f, add)


def post_ln(f, norm):
    """LN(h + f(h)) = a h + b with a = weight / sigma and b the rest (paper, Appendix C.3)."""

    def g(h):
        z = f(h)
        u = h + z
        a = norm.weight / (u.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return a, (z - u.mean(-1, keepdim=True)) * a + norm.bias

    return Part(g, lambda h, z: z[0] * h + z[1])


def residual_block(layer):
    def body(h):
        z = torch.relu(layer.bn1(layer.conv1(h)))
        z = layer.bn2(layer.conv2(z))
        return layer.bn3(layer.conv3(torch.relu(z))) if hasattr(layer, "conv3") else z

    def r(h, z):
        return torch.relu((h if layer.downsample is None else layer.downsample(h)) + z)

    return Part(body, r)


def parts(name, layer, args, kwargs):
    """A layer's sublayers, as the paper's table splits them."""
    if name.startswith("resnet"):
        return [residual_block(layer)]
    kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "use_cache")}
    if name == "mamba":
        return [pre_ln(lambda h: layer.mixer(layer.norm(h)))]
    if name == "gpt2":
        mask = args[1]
        return [
            pre_ln(lambda h: layer.attn(layer.ln_1(h), attention_mask=mask)[0]),
            pre_ln(lambda h: layer.mlp(layer.ln_2(h))),
        ]
    if name in ("bert", "roberta"):
        a, out = layer.attention, layer.output
        return [
            post_ln(
                lambda h: a.output.dense(a.self(h, attention_mask=args[0])[0]), a.output.LayerNorm
            ),
            post_ln(lambda h: out.dense(layer.intermediate(h)), out.LayerNorm),
        ]
    if name == "vit":
        return [
            pre_ln(lambda h: layer.attention(layer.layernorm_before(h))[0]),
            pre_ln(lambda h: layer.mlp(layer.layernorm_after(h))),
        ]
    return [
        pre_ln(lambda h: layer.self_attn(layer.input_layernorm(h), **kwargs)[0]),
        pre_ln(lambda h: layer.mlp(layer.post_attention_layernorm(h))),
    ]


def layers_of(model, name, trunk):
    if name.startswith("resnet"):
        stages = (model.layer1, model.layer2)
        return [block for stage in stages for block in stage]
    for path in trunk:
        try:
            return list(model.get_submodule(path))
        except AttributeError:
            continue
    raise AssertionError(f"no {trunk} in {name}")


class Dense:
    """The dense Jacobians of a two-layer model's trunk, and its b at the last state."""

    def __init__(self, name):
        case = build(name, 2)
        self.layers = layers_of(case.model, name, case.trunk)
        calls, ends = [], []

        def note(_, args, kwargs, out):
            calls.append((args, kwargs))
            ends.append(out)

        for layer in self.layers:
            layer.register_forward_hook(note, with_kwargs=True)
        loss = case.loss(case.model)
        (b_L,) = torch.autograd.grad(loss, ends[-1])
        made = [
            parts(name, layer, args[1:], kwargs)
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True)
        ]
        self.chain = oracle.DenseChain(
            [p for group in made for p in group], calls[0][0][0].detach()
        )
        torch.testing.assert_close(self.chain.states[-1], ends[-1].detach(), rtol=1e-10, atol=1e-11)
        zeros = [torch.zeros_like(h).flatten() for h in self.chain.states[:-1]]
        self.b = [*zeros, b_L.flatten()]
        named = {id(p): n for n, p in case.model.named_parameters()}
        self.leaves = {named[id(p)]: p for layer in self.layers for p in layer.parameters()}


@every_family
def test_below_L_gradients_are_the_sum_over_paths(name):
    dense = Dense(name)
    L = len(dense.chain.layers)
    for method in (
        hb.Highway(0),
        hb.Highway(1),
        hb.Highway(2),
        hb.Highway(1, gamma=0.3),
        hb.FixedPoint(1),
        hb.Highway(1, group_size=2),
    ):
        if L < 4 and getattr(method, "k", 0) >= L:
            continue
        case = build(name, 2)
        found = gradients(case, hb.convert(case.model, method))
        J, K, b = dense.chain.J, dense.chain.K, dense.b
        size = method.group_size
        if isinstance(method, hb.FixedPoint):
            w = oracle.fixed_point(dense.chain.A, b, method.k)
        else:
            J, K, b = oracle.grouped(J, K, b, size)
            J, K = oracle.with_gamma(J, K, method.gamma)
            w = oracle.highway(J, K, b, method.k)
            w = oracle.inside_groups(w, dense.chain.A, dense.b, size)
        wanted = dense.chain.leaf_gradients(w, list(dense.leaves.values()))
        tolerance = 1e-5 if name == "mamba" else 1e-9  # its scan computes in float32
        assert_same(
            {n: found[n] for n in dense.leaves},
            dict(zip(dense.leaves, wanted, strict=True)),
            tolerance,
        )


@every_transformer
def test_hidden_states_may_be_asked_for_and_enter_the_loss(name):
    case = build(name)
    untouched = copy.deepcopy(case.model)
    hb.convert(case.model, hb.Highway(99))
    found, wanted = (
        m(**case.batch, output_hidden_states=True).hidden_states for m in (case.model, untouched)
    )
    assert len(found) == len(wanted) == 3
    for states in (found, wanted):
        sum((i + 1) * h.sin().sum() for i, h in enumerate(states)).backward()
    assert_same(
        {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in untouched.named_parameters() if p.grad is not None},
    )


@every_transformer
def test_without_gradients_or_with_backprop_the_layers_themselves_run(name):
    case = build(name)
    model = hb.convert(case.model, hb.Highway(0))
    seen = []
    for layer in trunks(model)[0].layers:
        layer.register_forward_hook(lambda *_: seen.append("hook"))
    with torch.no_grad():
        case.loss(model)
    assert len(seen) == 2
    hb.set_method(model, hb.Backprop())
    exact = gradients(case, model)
    assert_same(exact, gradients(build(name), build(name).model), 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_generate_and_its_cache_are_as_before(name):
    case = build(name)
    untouched = copy.deepcopy(case.model).eval()
    model = hb.convert(case.model, hb.Highway(1))
    gradients(case, model)
    model.eval()
    prompt = case.batch["input_ids"][:1, :2]
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    found, wanted = model.generate(prompt, **asked), untouched.generate(prompt, **asked)
    assert torch.equal(found, wanted)
    with_cache = model(input_ids=prompt, use_cache=True)  # gradients on: the cache is filled too
    again = model(
        input_ids=case.batch["input_ids"][:1, 2:3],
        use_cache=True,
        **{
            key: getattr(with_cache, key)
            for key in ("cache", "past_key_values")
            if getattr(with_cache, key, None) is not None and key in with_cache
        },
    )
    whole = untouched(input_ids=case.batch["input_ids"][:1, :3]).logits[:, -1]
    torch.testing.assert_close(again.logits[:, -1], whole)


@every_transformer
def test_checkpoints_are_of_the_original_format(name, tmp_path):
    case = build(name)
    model = hb.convert(case.model, hb.Highway(1))
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert type(back) is type(model)
    saved, read = model.state_dict(), back.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[key], read[key]) for key in saved)
    hb.convert(back.train(), hb.Highway(1))
    assert_same(gradients(case, back), gradients(case, model), 1e-4)  # float32 in their RMSNorm


@every_family
def test_copies_and_pickles_train_on_their_own(name):
    case = build(name)
    model = hb.convert(case.model, hb.Highway(1))
    wanted = gradients(case, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad()
        assert_same(gradients(case, other), wanted)
        assert all(p.grad is None for p in model.parameters())


@every_transformer
def test_gradient_checkpointing_gives_the_same_gradients(name):
    case = build(name)
    model = hb.convert(case.model, hb.Highway(1))
    wanted = gradients(case, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(case, model), wanted)


def test_reentrant_checkpointing_is_refused():
    case = build("llama")
    model = hb.convert(case.model, hb.Highway(1))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=True; expected"):
        case.loss(model)


def test_dropout_is_drawn_as_before():
    from tests.highway_bp.hub_models import gpt2, tokens

    torch.manual_seed(0)
    model, x = gpt2(2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train(), tokens()
    results = []
    for method in (hb.Backprop(), hb.Highway(99)):
        other = hb.convert(copy.deepcopy(model), method)
        torch.manual_seed(1)
        other(input_ids=x, labels=x).loss.backward()
        results.append({n: p.grad for n, p in other.named_parameters()})
    assert_same(results[1], results[0], 1e-5)


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_lora(first):
    peft = pytest.importorskip("peft")

    def adapted(convert: bool) -> nn.Module:
        model = build("llama").model
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        if convert and first == "convert":
            return peft.get_peft_model(hb.convert(model, hb.Highway(99)), config).double()
        model = peft.get_peft_model(model, config).double()
        return hb.convert(model, hb.Highway(99)) if convert else model

    case = build("llama")
    found, wanted = (gradients(case, adapted(convert)) for convert in (True, False))
    assert all("lora" in name for name in wanted)
    assert_same(found, wanted)


def test_three_lines_and_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = tf.LlamaForCausalLM(config)
    hb.convert(model, hb.Highway(k=1))
    rows = [{"input_ids": (torch.arange(12) + i) % 16} for i in range(64)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(
            str(tmp_path),
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=10,
            report_to=[],
            save_strategy="steps",
            save_steps=60,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 < 2 < losses[0]
    model.eval()
    out = model.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert out[0].tolist() == list(range(3, 11))
    back = tf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-60")
    assert torch.equal(
        back.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False, pad_token_id=0),
        out,
    )


def test_a_state_between_layers_cannot_be_used_unnoticed():
    case = build("mamba")
    model = hb.convert(case.model, hb.Highway(1))
    states = model(**case.batch, output_hidden_states=True).hidden_states
    assert states[0].shape == (2, 4, 8)
    with pytest.raises(RuntimeError, match="uses the state between two layers"):
        states[0].sum()


@pytest.mark.parametrize(
    "name", ["llama", "bert", pytest.param("resnet-basic", marks=pytest.mark.xfail(strict=True))]
)
def test_torch_compile_around_a_trunk(name):
    case = build(name)
    model = hb.convert(case.model, hb.Highway(1))
    wanted = gradients(case, model)
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    case.loss(compiled).backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, h, scale=1.0):
        return h + scale * torch.tanh(self.f(h))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(3))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, scale=1 + i)
        return x.square().sum()


def test_a_model_that_is_not_known_is_named_by_hand():
    torch.manual_seed(0)
    model, x = Unknown().double(), torch.randn(2, 4).double()
    untouched = copy.deepcopy(model)
    hb.convert(model, hb.Highway(2, gamma=0.1), layers="blocks")
    a = build_chain_of(model)
    model(x).backward()
    chain_loss(a, x).backward()
    for p, q in zip(model.parameters(), a.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    hb.set_method(model, hb.Highway(3))
    model.zero_grad()
    model(x).backward()
    untouched(x).backward()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Counts(Unknown):
    def forward(self, x):
        for i in range(len(self.blocks)):
            x = self.blocks[i](x, scale=1 + i)
        return x.square().sum()


def test_a_loop_that_counts_its_layers_runs_them_as_a_chain():
    torch.manual_seed(0)
    model, x = Counts().double(), torch.randn(2, 4).double()
    other = Unknown().double()
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        hb.convert(m, hb.Highway(1), layers="blocks")
        m(x).backward()
    assert hb.iterations(model) == 1
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Scaled(nn.Module):
    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, h):
        return self.layer(h, scale=self.scale)


def build_chain_of(model):
    layers = [
        Scaled(copy.deepcopy(layer), 1 + i) for i, layer in enumerate(trunks(model)[0].layers)
    ]
    return hb.ResidualChain(layers, hb.Highway(2, gamma=0.1))


def chain_loss(chain, x):
    return chain(x).square().sum()


def test_a_sequential_is_a_trunk_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Adds(), Adds()), nn.Linear(4, 1)).double()
    untouched, x = copy.deepcopy(model), torch.randn(2, 4).double()
    hb.convert(model, hb.Highway(2), layers="1")
    model(x).sum().backward()
    untouched(x).sum().backward()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_layers_may_be_exchanged_after_the_conversion():
    case = build("llama")
    model = hb.convert(case.model, hb.Highway(99))
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    other = build("llama").model
    other.model.layers[1] = copy.deepcopy(other.model.layers[0])
    case.batch["use_cache"] = False
    assert_same(gradients(case, model), gradients(case, other))


def test_tied_layers_share_their_gradient():
    case = build("llama")
    wanted_model = build("llama").model
    for model in (case.model, wanted_model):
        model.model.layers[1] = model.model.layers[0]
        case.batch["use_cache"] = False
    model = hb.convert(case.model, hb.Highway(99))
    assert_same(gradients(case, model), gradients(case, wanted_model))


def test_frozen_layers_below_get_no_gradient():
    case, plain = build("gpt2"), build("gpt2")
    for model in (case.model, plain.model):
        for p in [
            *model.transformer.wte.parameters(),
            *model.transformer.wpe.parameters(),
            *model.transformer.h[0].parameters(),
        ]:
            p.requires_grad_(False)
    assert_same(
        gradients(case, hb.convert(case.model, hb.Highway(99))), gradients(plain, plain.model)
    )


def test_gradient_error_of_a_converted_model_goes_to_zero_and_leaves_no_trace():
    case = build("gpt2", 4)
    model = hb.convert(case.model, hb.Highway(3, gamma="auto"))
    case.loss(model).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    values = hb.method_state(model)
    errors = hb.gradient_error(model, case.loss, ks=range(9))
    assert [e.k for e in errors] == list(range(9))
    assert errors[0].relative_error > errors[3].relative_error > 1e-3
    assert errors[8].relative_error < 1e-9 and errors[8].cosine == pytest.approx(1.0)
    assert set(errors[0].parameters) == set(before)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    assert hb.method_state(model) == values
    assert trunks(model)[0].method == hb.Highway(3, gamma="auto")
