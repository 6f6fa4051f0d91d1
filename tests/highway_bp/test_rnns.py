"""`GRU` and `LSTM` against ``torch.nn``, autograd, and the chain of their own steps."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import highway_bp as hb
from highway_bp.rnn import layers as rnn_layers
from highway_bp.rnn import lstm as rnn_lstm

L, B, D, H = 6, 5, 3, 4
KINDS = {"GRU": (nn.GRU, hb.GRU), "LSTM": (nn.LSTM, hb.LSTM)}
CARRIES = [(kind, carry) for kind, (_, ours) in KINDS.items() for carry in ours.cells]
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "dropout 1": {"num_layers": 2, "dropout": 1.0},
}
EXACT = [  # as many iterations as layers, or windows
    *(hb.Highway(L), hb.Highway(L, gamma=0.3), hb.FixedPoint(L), hb.Backprop()),
    *(hb.Highway(3, group_size=2), hb.Highway(2, gamma=0.3, group_size=4)),
    *(hb.FixedPoint(2, group_size=4), hb.TruncatedBPTT(L), hb.TruncatedBPTT(2 * L)),
]

every_carry = pytest.mark.parametrize(("kind", "carry"), CARRIES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind: str, method=None, carry: str = "gate", dtype=torch.float64, **options):
    """torch's network, ours with the same weights, an input, and initial states."""
    torch.manual_seed(0)
    theirs, ours = KINDS[kind]
    plain = theirs(D, H, dtype=dtype, **options)
    network = ours(D, H, dtype=dtype, method=method, carry=carry, **options)
    network.load_state_dict(plain.state_dict())
    shape = (B, L, D) if options.get("batch_first") else (L, B, D)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    states = [torch.randn(rows, B, H, dtype=dtype) for _ in range(network.n_states)]
    return plain, network, torch.randn(shape, dtype=dtype), states


def flat(outputs) -> list[Tensor]:
    output, states = outputs
    return [output, *(states if isinstance(states, tuple) else [states])]


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    """A loss on every output and last state."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))


def results(rnn, x, states, call=lambda rnn, x, hx: rnn(x, hx)):
    """Outputs, and the gradients of input, initial states and parameters."""
    x, states = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in states]
    rnn = copy.deepcopy(rnn)
    outputs = flat(call(rnn, x, states[0] if len(states) == 1 else tuple(states)))
    weighted_sum(outputs).backward()
    return outputs, [t.grad for t in (x, *states, *rnn.parameters())]


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.linalg.vector_norm(a - b) <= tolerance * max(1.0, torch.linalg.vector_norm(b))


def assert_same_results(ours, theirs):
    assert_equal(ours[0], theirs[0], 1e-12)
    assert_equal(ours[1], theirs[1], 1e-9)


@every_carry
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", EXACT, ids=str)
def test_with_k_of_L_it_is_torchs(kind, carry, name, method):
    plain, ours, x, states = pair(kind, method, carry, **OPTIONS[name])
    assert_same_results(results(ours, x, states), results(plain, x, states))


# Each k: the chain of the steps, itself held to the brute-force sum over paths in test_paths.


class GRUStep(nn.Module):
    """Step t of a GRU as a layer, in plain operations; the state is h (B, H)."""

    def __init__(self, rnn, x_t, first):
        super().__init__()
        self.rnn, self.x_t = rnn, x_t

    def gates(self, h):
        i_r, i_z, i_n = (self.x_t @ self.rnn.weight_ih_l0.T + self.rnn.bias_ih_l0).chunk(3, -1)
        h_r, h_z, m = (h @ self.rnn.weight_hh_l0.T + self.rnn.bias_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
        return z, torch.tanh(i_n + r * m)

    def forward(self, h):
        z, n = self.gates(h)
        return z * h + (1 - z) * n

    def carry(self, h_in, h_out):
        if self.rnn.carry == "gate":
            return self.gates(h_in)[0]
        return diagonal(self.forward, h_in)


class LSTMStep(nn.Module):
    """Step t of an LSTM as a layer; the state is (c, h) side by side (B, 2H)."""

    def __init__(self, rnn, x_t, first):
        super().__init__()
        self.rnn, self.x_t, self.first = rnn, x_t, first

    def gates(self, h):
        w = self.rnn
        a = self.x_t @ w.weight_ih_l0.T + w.bias_ih_l0 + h @ w.weight_hh_l0.T + w.bias_hh_l0
        i, f, g, o = a.chunk(4, -1)
        return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

    def forward(self, s):
        c, h = s.chunk(2, -1)
        i, f, g, o = self.gates(h)
        c = f * c + i * g
        return torch.cat([c, o * torch.tanh(c)], -1)

    def carry(self, s_in, s_out):
        (c, h), c_out = s_in.chunk(2, -1), s_out.chunk(2, -1)[0]
        _, f, _, o = self.gates(h)
        if self.rnn.carry == "literal":
            return torch.cat([f, torch.zeros_like(f)], -1)
        q, q_before = o * (1 - torch.tanh(c_out) ** 2), 0.0
        if not self.first:
            q_before = h / torch.tanh(c) * (1 - torch.tanh(c) ** 2)
        if self.rnn.carry == "gate":
            return Map(lambda w_c, w_h: ((w_c + w_h * q) * f, 0 * w_h))
        to_c = diagonal(lambda h: self.forward(torch.cat([c, h], -1)).chunk(2, -1)[0], h)
        to_o = diagonal(lambda h: self.gates(h)[3], h) * torch.tanh(c_out)

        def carried(w_c, w_h):
            return (w_c + w_h * q) * (f + to_c * q_before) - w_h * to_o * q_before, w_h * to_o

        return Map(carried)


class Map:
    def __init__(self, halves):
        self.halves = halves

    def vecmat(self, w):
        return torch.cat(self.halves(*w.chunk(2, -1)), -1)


def diagonal(f, h: Tensor) -> Tensor:
    """dy_i/dh_i for each row, from the dense Jacobian."""
    rows = jacobian(f, h).detach()  # (B, H, B, H)
    return torch.einsum("bibi->bi", rows)


METHODS = [
    *(hb.Highway(k, gamma) for k, gamma in itertools.product(range(L), (0.0, 0.4))),
    *(hb.FixedPoint(k) for k in range(L)),
    *(hb.Highway(k, group_size=s) for k, s in itertools.product((0, 1), (2, 4, 5))),
    hb.Highway(1, gamma=0.4, group_size=2),
    hb.FixedPoint(1, group_size=2),
    *(hb.TruncatedBPTT(window) for window in (1, 2, 3, 4, 5)),
]


def gradients_over_time(kind: str, carry: str, method: hb.Method) -> tuple[list, list]:
    """Of the initial state and the weights: ours, and those of a chain of single steps."""
    _, ours, x, states = pair(kind, method, carry)
    _, (_, *grads) = results(ours, x, states)
    start = torch.cat([s[0] for s in reversed(states)], -1).requires_grad_()
    Step = GRUStep if kind == "GRU" else LSTMStep
    steps = [Step(ours, x_t, first=t == 0) for t, x_t in enumerate(x)]
    every = torch.stack(hb.ResidualChain(steps, method=method)(start, return_states=True))
    parts = every.chunk(len(states), -1)  # (c, h) or h
    weighted_sum([parts[-1], *(part[-1:] for part in reversed(parts))]).backward()
    start_grads = [g[None] for g in reversed(start.grad.chunk(len(states), -1))]
    return grads, [*start_grads, *(p.grad for p in ours.parameters())]


@every_carry
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_k_is_the_chain_of_steps(kind, carry, method):
    found, of_the_steps = gradients_over_time(kind, carry, method)
    assert_equal(found, of_the_steps, 1e-10)


@every_carry
@pytest.mark.parametrize(
    "method", [hb.Highway(2), hb.Highway(1, group_size=4), hb.MGRIT(1)], ids=str
)
def test_tiles_of_the_batch_and_pieces_of_the_steps_change_nothing(
    monkeypatch, kind, carry, method
):
    _, ours, x, states = pair(kind, method, carry)
    _, whole = results(ours, x, states)
    for module in (rnn_layers, rnn_lstm):  # two rows of five, step by step
        monkeypatch.setattr(module, "TILE_BYTES", 2 * L * H * 8)
    _, tiled = results(ours, x, states)
    assert_equal(tiled, whole, 1e-13)


@every_kind
def test_no_gradient_is_computed_where_none_is_wanted(kind):
    _, ours, x, _ = pair(kind, hb.Highway(2))
    ours(x)[0].sum().backward()
    free = ours.weight_hh_l0.grad.clone()
    ours.zero_grad()
    ours(x.requires_grad_())[0].sum().backward()
    assert torch.equal(free, ours.weight_hh_l0.grad) and x.grad is not None


# Sequences of different lengths.

LENGTHS = {"sorted": [6, 6, 4, 2, 1], "unsorted": [2, 6, 1, 6, 4]}


def packed(lengths, batch_first):
    def call(rnn, x, hx):
        order = lengths == sorted(lengths, reverse=True)
        given = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=order)
        output, states = rnn(given, hx)
        assert torch.equal(output.batch_sizes, given.batch_sizes)
        return pad_packed_sequence(output, batch_first)[0], states

    return call


@every_carry
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_and_padded_agree_with_torch(kind, carry, name, order):
    lengths, options = LENGTHS[order], OPTIONS[name]
    call = packed(lengths, options.get("batch_first", False))
    for method in (hb.Highway(L), hb.Backprop()):
        plain, ours, x, states = pair(kind, method, carry, **options)
        theirs = results(plain, x, states, call)
        assert_same_results(results(ours, x, states, call), theirs)
        given = results(ours, x, states, lambda rnn, x, hx: rnn(x, hx, lengths=lengths))
        assert_same_results(given, theirs)


@every_kind
def test_what_stands_behind_the_end_has_no_say(kind):
    _, ours, x, states = pair(kind, hb.Highway(2))
    lengths = torch.tensor(LENGTHS["unsorted"])
    clean = results(ours, x, states, lambda rnn, x, hx: rnn(x, hx, lengths))
    behind = torch.arange(L)[:, None] >= lengths
    dirty = torch.where(behind[..., None], torch.nan, x)
    seen = results(ours, dirty, states, lambda rnn, x, hx: rnn(x, hx, lengths))
    assert_equal([*seen[0], *seen[1]], [*clean[0], *clean[1]], 0.0)


def test_lengths_with_unbatched_or_packed_input_are_refused():
    _, ours, x, _ = pair("GRU", hb.Highway(1))
    for given in (x[:, 0], nn.utils.rnn.pack_sequence([x[:, 0]])):
        with pytest.raises(ValueError, match="padded input of 3 dimensions"):
            ours(given, lengths=[L])


# Dropping in and out.


@every_kind
def test_half_precision_scans_in_float32(kind):
    """bfloat16 weights: the gradient is within a bfloat16 product's error of the exact one."""
    plain, ours, x, states = pair(kind, hb.Highway(L))
    exact = results(plain, x, states)[1]
    half = results(ours.bfloat16(), x.bfloat16(), [s.bfloat16() for s in states])[1]
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.linalg.vector_norm(a.double() - b) <= 0.03 * torch.linalg.vector_norm(b)


@every_kind
def test_a_compiled_model_computes_the_same(kind):
    _, ours, x, states = pair(kind, hb.Highway(2))
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double()

    def step(rnn, x, hx):
        return rnn(model(x), hx)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for method in (hb.Highway(2), hb.Backprop(), hb.Highway(0)):
        ours.method = method
        plain = results(ours, x, states, step)
        assert_same_results(results(ours, x, states, compiled), plain)
