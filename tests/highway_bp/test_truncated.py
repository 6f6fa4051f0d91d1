"""Truncated BPTT: the gradient of a model that detaches its state after each window."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.architectures import Plain, mlp
from tests.highway_bp.test_recurrent import build

L, B, D, H = 8, 3, 4, 5
WINDOWS = pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8, 99])


def loss_on(outputs):
    weights = torch.linspace(0.5, 2, len(outputs), dtype=torch.float64)
    return sum(w * out.sin().sum() for w, out in zip(weights, outputs, strict=True))


def detached(rnn, x, state, window):
    """The loss of all steps, with states detached after each window but the last."""
    outputs = []
    for part in x.split(window):
        output, state = rnn(part, state)
        outputs += output
        parts = state if isinstance(state, tuple) else (state,)
        state = tuple(s.detach() for s in parts) if isinstance(state, tuple) else state.detach()
    return loss_on(outputs)


@WINDOWS
@pytest.mark.parametrize("kind", [hb.GRU, hb.LSTM])
def test_of_recurrent_layers(kind, window):
    torch.manual_seed(0)
    rnn, x = kind(D, H).double(), torch.randn(L, B, D).double().requires_grad_()
    exact = torch.autograd.grad(detached(rnn, x, None, window), [x, *rnn.parameters()])
    rnn.method = hb.TruncatedBPTT(window)
    found = torch.autograd.grad(loss_on(rnn(x)[0]), [x, *rnn.parameters()])
    torch.testing.assert_close(found, exact)


@WINDOWS
def test_of_a_cell_of_ones_own(window):
    rnn, x = build("minimal gated", None)
    rnn.method = hb.Backprop()
    weights = list(rnn.parameters())
    exact = torch.autograd.grad(detached(rnn, x, None, window), weights)
    rnn.method = hb.TruncatedBPTT(window)
    torch.testing.assert_close(torch.autograd.grad(loss_on(rnn(x)[0]), weights), exact)


@WINDOWS
def test_of_a_chain(window):
    torch.manual_seed(0)
    layers = nn.ModuleList(Plain(mlp()) for _ in range(L)).double()
    x = torch.randn(B, 4).double().requires_grad_()
    h, plain = x, []
    for i, layer in enumerate(layers):
        h = layer(h.detach() if i and i % window == 0 else h)
        plain.append(h)
    chain, found = hb.ResidualChain(layers, hb.TruncatedBPTT(window)), []
    for states in (plain, chain(x, return_states=True)):
        x.grad = None
        layers.zero_grad()
        for h in states:
            h.retain_grad()
        loss_on(states).backward()
        found.append([t.grad for t in (x, *layers.parameters(), *states)])
    torch.testing.assert_close(*found)
