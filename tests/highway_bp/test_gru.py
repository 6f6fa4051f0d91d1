"""`GRU` against ``nn.GRU``, autograd, and the chain of its own cell."""

import copy
import itertools

import pytest
import torch
from torch import nn

import highway_bp as hb
from highway_bp import gru as gru_module

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "layers": {"num_layers": 2},
    "batch_first": {"batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "dropout 1": {"num_layers": 2, "dropout": 1.0},
}
L, B, D, H = 6, 5, 3, 4


def pair(method, **options):
    torch.manual_seed(0)
    plain = nn.GRU(D, H, dtype=torch.float64, **options)
    ours = hb.GRU(D, H, dtype=torch.float64, method=method, **options)
    ours.load_state_dict(plain.state_dict())
    shape = (B, L, D) if options.get("batch_first") else (L, B, D)
    directions = 2 if options.get("bidirectional") else 1
    h_0 = torch.randn(directions * options.get("num_layers", 1), B, H, dtype=torch.float64)
    return plain, ours, torch.randn(shape, dtype=torch.float64), h_0


def results(rnn, x, h_0):
    """Outputs, and the gradients of everything under a loss on every output and on h_n."""
    x, h_0 = x.clone().requires_grad_(), h_0.clone().requires_grad_()
    rnn = copy.deepcopy(rnn)
    outputs = rnn(x, h_0)
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
        for o in outputs).backward()
    return outputs, [x.grad, h_0.grad, *(p.grad for p in rnn.parameters())]


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.linalg.vector_norm(a - b) <= tolerance * max(1.0, torch.linalg.vector_norm(b))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", [hb.Highway(L), hb.Highway(L, gamma=0.3), hb.FixedPoint(L)])
def test_k_of_L_is_nn_gru(name, method):
    plain, ours, x, h_0 = pair(method, **OPTIONS[name])
    outputs, grads = results(plain, x, h_0)
    our_outputs, our_grads = results(ours, x, h_0)
    assert_equal(our_outputs, outputs, 1e-12)
    assert_equal(our_grads, grads, 1e-9)


class Step(nn.Module):
    """Step t of the GRU as a layer of a `ResidualChain`, in plain operations."""

    def __init__(self, gru, x_t):
        super().__init__()
        self.gru, self.x_t = gru, x_t

    def gates(self, h):
        i_r, i_z, i_n = (self.x_t @ self.gru.weight_ih_l0.T + self.gru.bias_ih_l0).chunk(3, -1)
        h_r, h_z, m = (h @ self.gru.weight_hh_l0.T + self.gru.bias_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
        return z, torch.tanh(i_n + r * m)

    def forward(self, h):
        z, n = self.gates(h)
        return z * h + (1 - z) * n

    def carry(self, h_in, h_out):
        return self.gates(h_in)[0]


METHODS = [
    *(hb.Highway(k, gamma) for k, gamma in itertools.product(range(L), (0.0, 0.4, 1.0))),
    *(hb.FixedPoint(k) for k in range(L)),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_k_is_the_chain_of_steps(method):
    """The chain is held to the brute-force sum over paths in test_paths."""
    _, ours, x, h_0 = pair(method)
    _, grads = results(ours, x, h_0)
    start = h_0[0].clone().requires_grad_()
    chain = hb.ResidualChain([Step(ours, x_t) for x_t in x], method=method)
    states = torch.stack(chain(start, return_states=True))
    generator = torch.Generator().manual_seed(1)
    outputs = states, states[-1:]
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
        for o in outputs).backward()
    assert_equal(grads[1:], [start.grad[None], *(p.grad for p in ours.parameters())], 1e-10)


def test_tiles_of_the_batch_change_nothing(monkeypatch):
    _, ours, x, h_0 = pair(hb.Highway(2))
    _, whole = results(ours, x, h_0)
    monkeypatch.setattr(gru_module, "TILE_BYTES", 2 * L * H * 8)  # two rows of five
    _, tiled = results(ours, x, h_0)
    assert_equal(tiled, whole, 1e-13)


def test_unbatched_input():
    plain, ours, x, h_0 = pair(hb.Highway(L))
    outputs, grads = results(plain, x[:, 0], h_0[:, 0])
    our_outputs, our_grads = results(ours, x[:, 0], h_0[:, 0])
    assert_equal(our_outputs, outputs, 1e-12)
    assert_equal(our_grads, grads, 1e-9)


def test_the_state_dict_goes_there_and_back():
    plain, ours, _, _ = pair(hb.Highway(1), num_layers=2, bidirectional=True)
    back = nn.GRU(D, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    back.load_state_dict(ours.state_dict())
    assert list(back.state_dict()) == list(ours.state_dict()) == list(plain.state_dict())
    assert_equal(back.state_dict().values(), plain.state_dict().values(), 0.0)


def test_autocast_computes_in_the_weights_dtype():
    ours = hb.GRU(D, H, method=hb.Highway(1))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(torch.randn(L, B, D))
    output.sum().backward()
    assert output.dtype == ours.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("method, error, says", [
    (3, TypeError, "method=3; expected a gradient method"),
    (hb.Highway, TypeError, "expected a gradient method"),
    (hb.Highway(1, group_size=2), ValueError, "a GRU takes group_size=1"),
])
def test_wrong_methods(method, error, says):
    with pytest.raises(error, match=says):
        hb.GRU(D, H, method=method)


@pytest.mark.parametrize("shape, h_shape", [
    ((L, B, D + 1), None), ((L, B, D), (1, B + 1, H)), ((L, B, D), (2, B, H)),
    ((L, B, D, 1), None), ((L, D), (1, 1, H)),
], ids=str)
def test_what_nn_gru_rejects_is_rejected_alike(shape, h_shape):
    ours = hb.GRU(D, H, method=hb.Highway(1))
    arguments = [torch.randn(shape), *([] if h_shape is None else [torch.randn(h_shape)])]
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        nn.GRU(D, H)(*arguments)
    with pytest.raises(theirs.type) as raised:
        ours(*arguments)
    assert str(raised.value).split(",")[0] == str(theirs.value).split(",")[0]


def test_a_packed_sequence_is_refused_so_far():
    packed = nn.utils.rnn.pack_sequence([torch.randn(L, D)])
    with pytest.raises(TypeError, match="PackedSequence"):
        hb.GRU(D, H, method=hb.Highway(1))(packed)
