"""`gradient_error` against its definition, and that it leaves a model as it was; `estimated_error`
against its formula on dense Jacobians, and where it is the error itself."""

import copy
import math

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp.diagnostics.gradient_error import layer_name
from tests.highway_bp import architectures, oracle
from tests.highway_bp.architectures import ARCHITECTURES
from tests.highway_bp.converted import gradients
from tests.highway_bp.families import build, losses
from tests.highway_bp.test_paths import loss_of, reference

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


# -- estimates ------------------------------------------------------------------------------------


def dense_estimates(J, K, b, ks):
    """docs/method.md, section 5, by matrices."""
    L, found = len(b) - 1, []
    for k in ks:
        w, e = oracle.highway(J, K, b, k), [0.0]
        for i in reversed(range(L)):
            wA = w[i + 1] @ (J[i + 1] + K[i + 1])
            size = w[i + 1].norm()
            gain = wA.norm() / size if size else 0.0
            e.append((b[i] + wA - w[i]).norm() + gain * e[-1])
        found.append(torch.tensor(e).norm().item())
    whole = torch.cat(oracle.highway(J, K, b, max(ks))).norm().item()
    return [e / whole for e in found]


def estimates(model, loss, ks, method=None):
    found = hb.estimated_error(model, loss, ks, method)
    assert [e.k for e in found] == list(ks)
    return [e.relative_error for e in found]


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if architectures.build(n).x_requires_grad]
)
def test_it_is_its_formula_on_every_architecture(name):
    ref, a = reference(name), architectures.build(name)
    model = nn.Module()
    model.chain, model.before = hb.ResidualChain(a.layers), nn.Parameter(a.x.detach())

    def loss(model):
        return loss_of("all", model.chain(model.before, *a.args, return_states=True, **a.kwargs))

    J, K, b = ref.J, ref.K, ref.b["all"]
    cases = {
        hb.Highway(0): (J, K, b),
        hb.Highway(0, gamma=0.3): (*oracle.with_gamma(J, K, 0.3), b),
        hb.FixedPoint(0): (*oracle.with_gamma(J, K, 1.0), b),
        hb.Highway(0, group_size=2): oracle.grouped(J, K, b, 2),
    }
    for method, dense in cases.items():
        ks = range(min(len(dense[-1]), 4))
        expected = pytest.approx(dense_estimates(*dense, ks), rel=1e-8, abs=1e-12)
        assert estimates(model, loss, ks, method) == expected, method


class Scaling(nn.Module):
    """f(h) = h + s h, or over time x + (c + s) h with the carry c: every direction is alike."""

    def __init__(self, s, c=1.0):
        super().__init__()
        self.s, self.c = nn.Parameter(torch.tensor(s, dtype=torch.float64)), c

    def forward(self, h, state=None):
        return h + self.s * h if state is None else h + (self.c + self.s) * state

    def carry(self, *states):
        return torch.full_like(states[-1], self.c)


def scalar_errors(a, c, b):
    """||w - w^k|| / ||w|| for k = 0 .. L of a chain of equal numbers, a in the blocks."""
    L = len(b) - 1
    J, K = ([None, *[torch.full((1, 1), x, dtype=torch.float64)] * L] for x in (a, c))
    b = [torch.full((1,), x, dtype=torch.float64) for x in b]
    w = torch.stack([torch.cat(oracle.highway(J, K, b, k)) for k in range(L + 1)])
    return pytest.approx(((w - w[-1]).norm(dim=1) / w[-1].norm()).tolist(), rel=1e-9, abs=1e-12)


def test_it_is_the_error_of_a_positive_scalar_recurrence():
    model, x = hb.Recurrent(Scaling(0.3, 0.5)), torch.ones(6, 2, 3, dtype=torch.float64)

    def loss(model):
        return model(x, torch.zeros_like(x[0], requires_grad=True))[0].sum()

    assert estimates(model, loss, range(7)) == scalar_errors(0.3, 0.5, [0.0, *[1.0] * 6])
    windows = estimates(model, loss, range(4), hb.Highway(0, group_size=2))
    assert windows == scalar_errors(0.8**2 - 0.5**2, 0.5**2, [0.8, 1.8, 1.8, 1.0])


def test_gamma_may_be_estimated_and_the_model_is_left_as_it_was():
    model = hb.ResidualChain(Scaling(s) for s in (0.5, -0.2, 0.9))
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    plain, auto = (
        estimates(model, lambda model: model(x).sum(), range(2), hb.Highway(0, gamma))
        for gamma in (0.0, "auto")
    )
    assert min(plain) > 0.1 and max(auto) < 1e-6  # of such blocks gamma leaves nothing
    assert model.method == hb.Backprop() and x.grad is None and not model.gammas.values


def test_layers_and_directions_count_together():
    rnn = hb.GRU(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(9, 2, 3)
    found = estimates(rnn, lambda rnn: rnn(x)[0].square().sum(), range(10))
    assert found[0] > found[3] > found[6] > 0.0 == found[9]
    chains = nn.ModuleList(hb.ResidualChain(Scaling(s) for s in pair) for pair in [(1, 2), (3, 4)])
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    each = [estimates(chain, lambda chain: chain(x).sum(), (0, 2)) for chain in chains]
    sizes = [math.sqrt(1 + 3**2 + 6**2), math.sqrt(1 + 5**2 + 20**2)]
    both = estimates(chains, lambda chains: sum(chain(x).sum() for chain in chains), (0, 2))
    together = math.hypot(*(e[0] * size for e, size in zip(each, sizes, strict=True)))
    assert both == pytest.approx([together / math.hypot(*sizes), 0.0])


@pytest.mark.parametrize("measure", [hb.gradient_error, hb.estimated_error])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (dict(model=nn.GRU(2, 2)), "GRU holds no hb.ResidualChain"),
        (dict(ks=[0, -1], loss_fn=lambda m: 1 / 0), "ks=-1; expected a whole number, at least 0"),
        (dict(ks=2, loss_fn=lambda m: 1 / 0), "ks=2; expected a list of whole numbers"),
    ],
)
def test_wrong_input_gets_one_clear_line(measure, arguments, line):
    """Before any pass."""
    given = dict(
        model=hb.ResidualChain([nn.Linear(3, 3)]), loss_fn=lambda m: m(torch.ones(1, 3)).sum()
    )
    with pytest.raises((TypeError, ValueError), match=line) as error:
        measure(**given | arguments)
    assert "\n" not in str(error.value)


def test_what_cannot_be_estimated():
    with pytest.raises(ValueError, match="no gradient went through the chains"):
        hb.estimated_error(hb.ResidualChain([nn.Linear(3, 3)]), lambda m: m[0].weight.sum())
    with pytest.raises(ValueError, match="gamma='auto' in a recurrent layer; expected a number"):
        hb.estimated_error(hb.GRU(2, 2), lambda m: 1 / 0, method=hb.Highway(0, "auto"))
