"""Recurrent layers where users have met trouble: each as torch's own, or refused in one line."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import highway_bp as hb
from tests.highway_bp import test_rnns
from tests.highway_bp.test_recurrent_refuses import Decay
from tests.highway_bp.test_rnns import KINDS, B, D, H, L, every_kind, flat

EXACT = [hb.Backprop(), hb.Highway(L), hb.Highway(3, group_size=2)]
every_exact = pytest.mark.parametrize("method", EXACT, ids=str)


def pair(kind: str, method: hb.Method, **options):
    """torch's network and ours with the same weights, float32."""
    return test_rnns.pair(kind, method, dtype=torch.float32, **options)[:2]


def gradients(rnn, x, call):
    rnn.zero_grad()
    x = x.clone().requires_grad_()
    call(rnn, x).backward()
    return [x.grad, *(p.grad for p in rnn.parameters())]


def assert_same(kind, method, x, call, tolerance=1e-5, **options):
    plain, ours = pair(kind, method, **options)
    found, exact = gradients(ours, x, call), gradients(plain, x, call)
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@every_kind
@every_exact
def test_an_empty_batch(kind, method):
    def call(rnn, x):
        return rnn(x)[0].sum() + (rnn(x[:, :0])[0] ** 2).sum()

    assert_same(kind, method, torch.randn(L, B, D), call)
    assert_same(kind, method, torch.randn(L, 0, D), lambda rnn, x: rnn(x)[0].sum())


@every_kind
@pytest.mark.parametrize(
    "method", [hb.Highway(2, 0.3), hb.Highway(1, group_size=2), hb.MGRIT(1, 2)], ids=str
)
def test_another_default_device(kind, method):
    """As with ``torch.set_default_device("cuda")`` and a model on another one."""
    rnn = pair(kind, method, num_layers=2, bidirectional=True)[1]
    lengths = [L, 4, 1, 2, 3] if method.group_size == 1 else None
    x, found = torch.randn(L, B, D), []
    for default in ("cpu", "meta"):
        with torch.device(default):
            found.append(gradients(rnn, x, lambda rnn, x: rnn(x, lengths=lengths)[0].sin().sum()))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("write", ["mul_", "dropout"])
@every_exact
def test_writing_into_the_output(method, write):
    def call(rnn, x):
        o, h = rnn(x)
        o = o.mul_(2) if write == "mul_" else nn.functional.dropout(o, 0.0, inplace=True)
        return o.square().sum() + h.sum()

    assert_same("GRU", method, torch.randn(L, B, D), call)
    plain, ours = pair("LSTM", method)
    if method != hb.Backprop():  # which torch's LSTM refuses
        exact = gradients(plain, torch.ones(L, B, D), lambda rnn, x: (2 * rnn(x)[0]).sum())
        found = gradients(ours, torch.ones(L, B, D), lambda rnn, x: rnn(x)[0].mul_(2).sum())
        torch.testing.assert_close(found, exact)


@every_kind
@every_exact
def test_gradients_share_no_memory(kind, method):
    """As those of an LSTM's two biases, which are equal: clipping writes into them."""
    rnn = pair(kind, method)[1]
    rnn(torch.ones(L, B, D))[0].sum().backward()
    assert len({p.grad.untyped_storage()._cdata for p in rnn.parameters()}) == 4


@every_kind
@every_exact
def test_gates_near_zero_keep_their_precision(kind, method):
    """The candidate's weights are small: so are other gates' gradients, each up to rounding."""

    def gradient(rnn, dtype):
        with torch.no_grad():
            [p[2 * H : 3 * H].mul_(1e-4) for p in rnn.parameters()]
        loss = rnn.to(dtype)(torch.ones(L, B, D, dtype=dtype))[0].square().sum()
        return torch.autograd.grad(loss, rnn.weight_ih_l0)[0].double().split(H)

    plain, ours = pair(kind, method)
    pairs = zip(gradient(ours, torch.float32), gradient(plain, torch.float64), strict=True)
    assert max((found - exact).norm() / exact.norm() for found, exact in pairs) < 1e-5


@every_kind
@pytest.mark.parametrize("method", EXACT[1:], ids=str)  # torch's LSTM takes the new ones
def test_other_weights_before_the_backward_pass(kind, method):
    """By ``p.data = ...``, as for averages of weights: the gradient is that of the weights used."""
    plain, ours = pair(kind, method)
    exact, found = (rnn(torch.ones(L, B, D))[0].square().sum() for rnn in (plain, ours))
    for p in ours.parameters():
        p.data = p.data / 2
    found = torch.autograd.grad(found, list(ours.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(exact, list(plain.parameters())))


@every_kind
@every_exact
@pytest.mark.parametrize("look", ["hook", "retain_grad", "autograd.grad"])
def test_a_look_at_the_output_beside_a_loss_on_the_last_state(kind, method, look):
    """Output and last state are two results."""

    def gradients(rnn):
        o, *last = flat(rnn(torch.ones(L, B, D)))
        loss = o.square().sum() + 3 * sum(map(torch.sum, last))
        if look == "autograd.grad":
            return torch.autograd.grad(loss, o)
        if look == "hook":
            o.register_hook(lambda g: g.clamp(-0.05, 0.05))
        o.retain_grad()
        loss.backward()
        return [o.grad, *(p.grad for p in rnn.parameters())]

    plain, ours = pair(kind, method)
    torch.testing.assert_close(gradients(ours), gradients(plain))


@every_kind
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_the_cpu(kind, options, dtype):
    """In training and evaluation the dtypes and values of torch, its gradients within rounding."""
    plain, ours = pair(kind, hb.Highway(L), **options)
    x = torch.randn(L, B, D, dtype=dtype)
    kept = [p.grad for p in ours.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        results = [flat(plain(x)), flat(ours(x))]
        with torch.no_grad():
            results.append(flat(ours.eval()(x)))
    for wanted, training, evaluation in zip(*results, strict=True):
        assert training.dtype == wanted.dtype == evaluation.dtype
        assert torch.equal(training, wanted) and torch.equal(training, evaluation)
    for outputs in results[:2]:
        sum(o.float().square().sum() for o in outputs).backward()
    assert kept == [None] * len(kept)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype == torch.float32
        assert torch.dist(p.grad, q.grad) <= 0.03 * q.grad.norm()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_a_packed_sequence(kind, dtype):
    given = pack_padded_sequence(torch.randn(L, B, D, dtype=dtype), [6, 4, 4, 2, 1])
    plain, ours = pair(kind, hb.Highway(L))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = plain(given), ours(given)
    for a, b in zip(
        flat((found[0].data, found[1])), flat((wanted[0].data, wanted[1])), strict=True
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@every_kind
def test_a_loss_computed_and_differentiated_under_autocast(kind):
    _, ours = pair(kind, hb.Highway(2))
    with torch.autocast("cpu", torch.bfloat16):
        ours(torch.randn(L, B, D))[0].sum().backward()
    assert ours.weight_hh_l0.grad.isfinite().all()


@every_kind
@pytest.mark.parametrize("k", [1, 12])
def test_products_of_carries_that_overflow(kind, k):
    """One loss, early in the sequence; the steps behind it have large diagonals and no gradient."""
    L, B = 12, 2

    def call(rnn, x):
        return rnn(x)[0][0].sum()

    plain, ours = KINDS[kind][0](D, H), KINDS[kind][1](D, H, carry="diagonal")
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.zero_()
            if name == "weight_hh_l0":
                p.view(-1, H, H).diagonal(dim1=1, dim2=2).fill_(1e12)
    ours.load_state_dict(plain.state_dict())
    ours.method = hb.Highway(k)
    x = torch.zeros(L, B, D)
    exact = gradients(plain, x, call)
    assert exact[0].isfinite().all()
    found = gradients(ours, x, call)
    torch.testing.assert_close(found, exact)
    ours.method = hb.Highway(k, group_size=3)
    torch.testing.assert_close(gradients(ours, x, call), exact)


@every_kind
@every_exact
def test_the_meta_device(kind, method):
    ours = KINDS[kind][1](D, H, device="meta", method=method)
    output, _ = ours(torch.empty(L, B, D, device="meta"))
    output.sum().backward()
    assert output.is_meta and ours.weight_hh_l0.grad.shape == ours.weight_hh_l0.shape


X = torch.randn(L, B, D)
DTYPES = (torch.float64, torch.int64, torch.half, torch.cfloat)
BAD = {  # an input, and a state
    "width": (torch.zeros(L, B, D + 1), None),
    "dtype": (X.double(), None),
    "no steps": (torch.zeros(0, B, D), None),
    "0-d": (torch.zeros(()), None),
    "4-d": (torch.zeros(L, B, D, 1), None),
    "a batch of another size": (X, torch.zeros(1, B + 1, H)),
    "two layers": (X, torch.zeros(2, B, H)),
    "a state of another width": (X, torch.zeros(1, B, H + 1)),
    "a state without batch": (X, torch.zeros(B, H)),
    "an input without batch": (torch.zeros(L, D), torch.zeros(1, 1, H)),
    **{str(dtype): (X, torch.zeros(1, B, H).to(dtype)) for dtype in DTYPES},
}


@every_kind
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", [hb.Highway(1), hb.Highway(1, group_size=2)], ids=str)
def test_bad_input_raises_as_torch(kind, bad, method):
    x, state = BAD[bad]
    hx = (state, state) if state is not None and kind == "LSTM" else state
    assert_raise_alike(kind, method, x, hx)


def test_three_states_raise_as_torch():
    assert_raise_alike("LSTM", hb.Highway(1), X, (torch.zeros(1, B, H),) * 3)


def assert_raise_alike(kind, method, x, hx):
    said = []
    for rnn in pair(kind, method):
        with pytest.raises((RuntimeError, ValueError)) as seen:
            rnn(x, hx)
        said.append((seen.type, str(seen.value)))
    assert said[0] == said[1]


TRANSFORMS = {
    "func.grad": lambda rnn, x: torch.func.grad(lambda x: rnn(x)[0].sum())(x),
    "func.vjp": lambda rnn, x: torch.func.vjp(lambda x: rnn(x)[0].sum(), x)[1](torch.ones(())),
    "func.jacrev": lambda rnn, x: torch.func.jacrev(lambda x: rnn(x)[0].sum())(x),
    "functional_call": lambda rnn, x: torch.func.grad(
        lambda p: torch.func.functional_call(rnn, p, (x,))[0].sum()
    )(dict(rnn.named_parameters())),
    "is_grads_batched": lambda rnn, x: torch.autograd.grad(
        rnn(x)[0], list(rnn.parameters()), torch.ones(2, L, B, H), is_grads_batched=True
    ),
    "vectorize": lambda rnn, x: torch.autograd.functional.jacobian(
        lambda x: rnn(x)[0].sum((0, 1)), x, vectorize=True
    ),
}
RNNS = {
    "GRU": hb.GRU,
    "LSTM": hb.LSTM,
    "Recurrent": lambda D, H, method: hb.Recurrent(Decay(D, H), method=method),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", RNNS)
def test_transforms_are_refused_in_one_line(kind, name):
    rnn = RNNS[kind](D, H, method=hb.Highway(1))
    with pytest.raises(RuntimeError, match=r"; expected .*Backprop\(\)") as seen:
        TRANSFORMS[name](rnn, torch.randn(L, B, D))
    assert "\n" not in str(seen.value) and "INTERNAL ASSERT" not in str(seen.value)


@every_kind
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "func" in name])
def test_backprop_takes_transforms(kind, name):
    theirs, ours = KINDS[kind][0](D, H), KINDS[kind][1](D, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(L, B, D)
    wanted, found = (TRANSFORMS[name](rnn, x) for rnn in (theirs, ours))
    torch.testing.assert_close(*(pytree.tree_leaves(t) for t in (found, wanted)))


@every_kind
def test_the_signature_is_torchs_and_ours(kind):
    theirs, ours = KINDS[kind]
    found = list(inspect.signature(ours).parameters)
    assert found[-2:] == ["method", "carry"]
    plain = theirs(2, 3, 2, False, True, 0.5, True)
    network = ours(2, 3, 2, False, True, 0.5, True)
    assert [p.shape for p in network.parameters()] == [p.shape for p in plain.parameters()]
    assert plain.extra_repr() in network.extra_repr()
    wanted = set(theirs.__doc__.split("__init__(")[1].split(")")[0].replace("=", ",").split(","))
    assert set(found[:-2]) <= wanted


@every_kind
@pytest.mark.parametrize("packed", [True, False])
def test_lengths_are_copied_once(kind, packed, monkeypatch):
    """Whatever goes to the CPU would wait for a GPU: one tensor, the lengths that were given."""
    ours = KINDS[kind][1](D, H, num_layers=2, bidirectional=True, method=hb.Highway(1))
    x, lengths = torch.randn(L, B, D), torch.tensor([3, 6, 1, 2, 2])
    given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    copies, cpu, as_tensor = [], torch.Tensor.cpu, torch.as_tensor
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: (copies.append(t), cpu(t))[1])
    monkeypatch.setattr(torch, "as_tensor", lambda t, **o: (copies.append(t), as_tensor(t, **o))[1])
    ours(given) if packed else ours(x, lengths=lengths)
    assert [t is lengths for t in copies] == ([] if packed else [True])


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers_of_a_packed_sequence_draws_torchs_numbers(kind, bidirectional):
    options = {"num_layers": 3, "dropout": 0.5, "bidirectional": bidirectional}
    plain, ours = pair(kind, hb.Highway(L), **options)
    x, found = torch.randn(L, B, D), []
    for rnn in (plain, ours):
        torch.manual_seed(3)
        lengths = [L, *range(L - 1, L - B, -1)]
        found.append(flat(rnn(pack_padded_sequence(x, lengths))))
        found[-1].append(torch.get_rng_state())
    torch.testing.assert_close(*found)
