"""PyTorch's own list of modules to test: its entries of GRU and LSTM, run on ours."""

import copy
import pickle
import sys
import unittest
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

import highway_bp as hb
from tests.highway_bp.test_rnns import KINDS, every_kind

METHODS = {"Backprop": hb.Backprop(), "Highway": hb.Highway(9)}  # exact, as L <= 3
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def entries():
    """`ModuleInfo` of each kind; expecttest, a base class of tests not run here, may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        if find_spec("expecttest") is None:
            patch.setitem(sys.modules, "expecttest", SimpleNamespace(TestCase=unittest.TestCase))
        from torch.testing._internal.common_modules import module_db
    return {kind: next(m for m in module_db if m.module_cls is KINDS[kind][0]) for kind in KINDS}


def samples(entry, kind: str, method: hb.Method, training: bool):
    """(torch's module, ours, sample) for every sample that the method can take."""
    found = entry.module_inputs_func(
        entry, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    for sample in found:
        given = sample.constructor_input
        options = {"dtype": torch.float64, **given.kwargs}
        if options.get("proj_size") and method != hb.Backprop():
            continue  # refused, see docs/method.md
        theirs, ours = KINDS[kind]
        plain = theirs(*given.args, **options).train(training)
        network = ours(*given.args, **options, method=method).train(training)
        network.load_state_dict(plain.state_dict())
        yield plain, network, sample


def tensors(nested) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [t for part in nested for t in tensors(part)]


def results(rnn, args) -> list[Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    outputs, leaves = tensors(rnn(*args)), [*tensors(args), *rnn.parameters()]
    return [*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)]


def as_torch(plain, ours, sample):
    args = sample.forward_input.args
    torch.testing.assert_close(results(ours, args), results(plain, args))


def from_non_contiguous_input(plain, ours, sample):
    def spread(t):
        return torch.stack([t, t], -1)[..., 0].detach().requires_grad_()

    args = sample.forward_input.args
    apart = [spread(a) if isinstance(a, Tensor) else tuple(map(spread, a)) for a in args]
    torch.testing.assert_close(results(ours, apart), results(plain, args))


def after_copies(plain, ours, sample):
    args = sample.forward_input.args
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(other) == repr(ours)
        torch.testing.assert_close(results(other, args), results(plain, args))


def after_the_meta_device(plain, ours, sample):
    ours = ours.to("meta").to_empty(device="cpu")
    ours.load_state_dict(plain.state_dict())
    as_torch(plain, ours, sample)


def gradgradcheck(plain, ours, sample):
    """First derivatives are compared with torch's by the other checks."""
    if ours.training or not ours.bias:
        return  # a quarter of the samples is enough: they take their time
    x, *given = sample.forward_input.args
    states = tensors(given)

    def call(x, *others):
        hx = others[: len(states)]
        return tuple(tensors(ours(x, None if not hx else hx[0] if len(hx) == 1 else hx)))

    inputs = [x, *states, *ours.parameters()]
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


CHECKS = [as_torch, from_non_contiguous_input, after_copies, after_the_meta_device, gradgradcheck]
REFUSED = pytest.mark.xfail(raises=RuntimeError, reason="no second derivative, see Limits")


@every_kind
@pytest.mark.parametrize(
    ("check", "method"),
    [
        pytest.param(c, m, marks=[REFUSED] if (c, m) == (gradgradcheck, "Highway") else [])
        for c in CHECKS
        for m in METHODS
    ],
)
def test_module(entries, kind, check, method):
    seen = 0
    for training in (True, False):
        for sample in samples(entries[kind], kind, METHODS[method], training):
            check(*sample)
            seen += 1
    assert seen == 32 if kind == "GRU" or method == "Highway" else 64


X = torch.randn(3, 2, 4)
TOOLS = {
    "torch.jit.script": lambda rnn: torch.jit.script(nn.Sequential(rnn))(X),
    "torch.fx": lambda rnn: torch.fx.symbolic_trace(nn.Sequential(rnn))(X),
    "quantize_dynamic": lambda rnn: torch.ao.quantization.quantize_dynamic(nn.Sequential(rnn))[0],
}


@every_kind
def test_strict_export(kind):
    exported = torch.export.export(KINDS[kind][1](4, 5), (X,), strict=True)
    assert exported.module()(X)[0].shape == (3, 2, 5)


@every_kind
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("ours", [False, pytest.param(True, marks=pytest.mark.xfail)])
def test_tools_that_know_torchs_class_alone(kind, tool, ours):
    """As docs/method.md says under Limits, even with ``Backprop()``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = TOOLS[tool](KINDS[kind][ours](4, 5))
    assert tool != "quantize_dynamic" or "quantized" in type(made).__module__


class Dropped(nn.Module):
    def forward(self, w):
        return nn.functional.dropout(w, 0.3)


PARAMETRIZED = {
    "state": lambda rnn: spectral_norm(rnn, "weight_hh_l0"),
    "random numbers": lambda rnn: register_parametrization(rnn, "weight_hh_l1", Dropped()),
}


@every_kind
@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_weights_are_computed_as_often_as_by_torch(kind, parametrize):
    found = []
    for make in KINDS[kind]:
        torch.manual_seed(0)
        rnn = make(4, 5, 2)
        if make is not KINDS[kind][0]:
            rnn.method = hb.Highway(9)
        parametrize(rnn)
        rnn(X)[0].square().sum().backward()
        grads = [p.grad for p in rnn.parameters()]
        found.append([*grads, *rnn.buffers(), torch.rand(1)])
    torch.testing.assert_close(*found)
