"""`hb.Recurrent` refuses a cell whose steps are no rows of one batch, and others like it."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import function

L, B, D, H = 6, 5, 3, 4


class Decay(nn.Module):
    """h' = h / 2 + more(tanh(x W)), with the carry 1/2."""

    def __init__(self, inputs, hidden, more=None):
        super().__init__()
        self.project, self.more = nn.Linear(inputs, hidden), more or nn.Identity()

    def forward(self, x, h):
        return 0.5 * h + self.more(torch.tanh(self.project(x) + h))

    def carry(self, x, before, after):
        return torch.full_like(before, 0.5)

    def initial_state(self, B):
        return self.project.weight.new_zeros(B, self.project.out_features)


class Noise(nn.Module):
    def forward(self, h):
        return h + 1e-9 * torch.randn_like(h)


class Mean(nn.Module):
    def forward(self, h):
        return h - h.mean(0)


class WritesGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(H))

    def forward(self, h):
        return function(lambda ctx, h: h.clone(), self.backward)(h) + self.bias

    def backward(self, ctx, g):
        self.bias.grad = torch.ones_like(self.bias)
        return g


class Captures(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = [torch.ones(H, requires_grad=True)]

    def forward(self, h):
        return h * self.held[0]


class Applies(nn.Module):
    """A function with that backward pass; what the forward pass saves it may use once."""

    def __init__(self, backward):
        super().__init__()
        self.backward = backward

    def forward(self, h):
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h.clone()

        return function(forward, self.backward)(h)


def overwrites(ctx, g):
    """The gradient takes the memory of what was saved, as in fused kernels."""
    (h,) = ctx.saved_tensors
    h.data.copy_(g * h.cos())
    return h


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (nn.Dropout(0.1), r"Decay draws random numbers \(dropout\?\)"),
        (Noise(), "Decay draws random numbers"),
        (nn.BatchNorm1d(H), "Decay computes other states with all steps as rows of one batch"),
        (Mean(), "Decay computes other states with all steps as rows of one batch"),
        (Captures(), r"Decay uses a tensor of shape \[4\] that requires a gradient"),
        (WritesGradient(), "Decay writes the gradients of parameters itself"),
        (Applies(overwrites), "the backward pass of Decay cannot run twice"),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("method", [hb.Highway(L), hb.Highway(3, group_size=2)], ids=str)
def test_a_cell_that_cannot_run_as_rows_is_refused(more, says, method):
    rnn = hb.Recurrent(Decay(D, H, more), method=method)
    with pytest.raises(RuntimeError, match=says):
        rnn(torch.randn(L, B, D))[0].square().sum().backward()
    rnn.method = hb.Backprop()
    rnn(torch.randn(L, B, D))[0].square().sum().backward()


@pytest.mark.parametrize(
    ("backward", "does"),
    [
        (lambda ctx, g: g + 1, "adds to the gradient"),  # the gradient of a loss on h
        (lambda ctx, g: g.clamp(-1e-3, 1e-3), "clips the gradient"),
    ],
)
def test_a_cell_that_is_exact_by_steps_and_refused_in_windows(backward, does):
    rnn, found = hb.Recurrent(Decay(D, H, Applies(backward))).double(), []
    x = torch.randn(L, B, D).double()
    for method in (hb.Backprop(), hb.Highway(L)):
        rnn.method = method
        found.append(torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters())))
    torch.testing.assert_close(*found)
    rnn.method = hb.Highway(3, group_size=2)
    with pytest.raises(RuntimeError, match=f"Decay {does} in its backward pass"):
        rnn(x)[0].square().sum().backward()


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(
    "backward",
    [
        lambda ctx, g: g / max(1.0, g.norm()),
        lambda ctx, g: g / len(g),
        lambda ctx, g: g - g.mean(0),
    ],
    ids=["norm", "share", "mean"],
)
def test_a_cell_whose_backward_pass_mixes_rows_is_refused(backward, group_size):
    rnn = hb.Recurrent(Decay(D, H, Applies(backward)), method=hb.Highway(L, group_size=group_size))
    with pytest.raises(RuntimeError, match=r"Decay (mixes the rows|clips the gradient)"):
        (1e3 * rnn(torch.randn(L, B, D))[0]).sum().backward()


class WithContext(Decay):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("context", torch.ones(B, H))

    def forward(self, x, h):
        return super().forward(x, h) + self.context


def test_a_cell_with_a_row_for_each_sequence_is_refused():
    rnn = hb.Recurrent(WithContext(D, H), method=hb.Highway(1))
    with pytest.raises(RuntimeError, match="WithContext fails with all steps as rows of one batch"):
        rnn(torch.randn(L, B, D))[0].sum().backward()


def test_a_backward_pass_in_inference_mode_is_refused():
    loss = hb.Recurrent(Decay(D, H), method=hb.Highway(1))(torch.randn(L, B, D))[0].sum()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="pass in inference mode"):
        loss.backward()


def test_the_carry_is_that_of_the_cell_that_runs():
    rnn, called = hb.Recurrent(Decay(D, H), method=hb.Highway(0)), []
    rnn.cell = Decay(D, H)
    rnn.cell.carry = lambda x, before, after: called.append(1) or 0.5
    rnn(torch.randn(L, B, D))[0].sum().backward()
    assert called


def test_a_frozen_cell_with_a_tensor_that_wants_a_gradient_is_refused():
    rnn = hb.Recurrent(Decay(D, H, Captures()).requires_grad_(False), method=hb.Highway(1))
    with pytest.raises(RuntimeError, match="Decay uses a tensor that requires a gradient and is"):
        rnn(torch.randn(L, B, D))


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("values", [lambda h: h.detach(), lambda h: h.data])
def test_a_cell_that_writes_into_its_state_is_refused(values, group_size):
    class Clamps(Decay):
        def forward(self, x, h):
            values(h).clamp_(-0.1, 0.1)
            return super().forward(x, h)

    rnn = hb.Recurrent(Clamps(D, H, nn.Identity()), method=hb.Highway(1, group_size=group_size))
    outputs, _ = rnn(torch.randn(L, B, D))
    with pytest.raises(RuntimeError, match=r"Clamps (writes into the state|computes other states)"):
        outputs.sum().backward()


@pytest.mark.parametrize("more", [nn.Dropout(0.5), nn.BatchNorm1d(H)], ids=repr)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("batch", [B, 0])
def test_a_cell_in_evaluation_is_exact(more, amp, batch):
    torch.manual_seed(0)
    rnn = hb.Recurrent(Decay(D, H, more)).eval()
    x, found = torch.randn(L, batch, D), []
    for method in (hb.Backprop(), hb.Highway(L)):
        rnn.method = method
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outputs = rnn(x)[0]
        rnn.zero_grad()
        outputs.square().sum().backward()
        found.append([p.grad for p in rnn.parameters()])
    tolerance = 0.02 if amp else 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
