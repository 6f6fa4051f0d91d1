"""`Recurrent`: any cell, against autograd and against `GRU`."""

import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import highway_bp as hb
from models.cells import MinimalGatedCell, SLSTMCell
from tests.highway_bp.converted import function

L, B, D, H = 7, 3, 2, 4
CELLS = {"minimal gated": MinimalGatedCell, "sLSTM": SLSTMCell}
EXACT = [hb.Highway(L), hb.Highway(L, gamma=0.5), hb.FixedPoint(L), hb.TruncatedBPTT(L)]
EXACT += [hb.Highway(3, group_size=3)]
every_cell = pytest.mark.parametrize("name", CELLS)
X, ZEROS, CELL = torch.ones(L, B, D), torch.zeros(B, H), MinimalGatedCell(D, H)


def gradients(network, x, state=None):
    x = x.clone().requires_grad_()
    network.zero_grad()
    outputs, _ = network(x, state)
    (outputs * torch.linspace(0.5, 1.5, L, dtype=x.dtype)[:, None, None]).square().sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def build(name, method, seed=0):
    torch.manual_seed(seed)
    network = hb.Recurrent(CELLS[name](D, H), method=method).double()
    return network, torch.randn(L, B, D, dtype=torch.float64)


def assert_exact(network, run, method=None):
    """``run(network)`` gives the gradients that it gives by backpropagation."""
    found = []
    for each in (hb.Backprop(), method or hb.Highway(L)):
        network.method = each
        found.append(run(network))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@every_cell
@pytest.mark.parametrize("method", EXACT, ids=str)
def test_with_k_of_L_it_is_autograd(name, method):
    network, x = build(name, None)
    assert_exact(network, lambda network: gradients(network, x), method)


class GRUCell(nn.Module):
    """torch's own GRU cell with its update gate as carry."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(D, H)

    def forward(self, x, h):
        return self.cell(x, h)

    def carry(self, x, before, after):
        i = x @ self.cell.weight_ih.T + self.cell.bias_ih
        h = before @ self.cell.weight_hh.T + self.cell.bias_hh
        return torch.sigmoid(i + h)[:, H : 2 * H]


def with_a_gru_cell_and_of_hb_gru(method: hb.Method) -> tuple[list, list]:
    """Output and gradients of both, with the same weights."""
    torch.manual_seed(0)
    network = hb.Recurrent(GRUCell(), method=method).double()
    gru = hb.GRU(D, H, method=method, dtype=torch.float64)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    gru.load_state_dict({f"{n}_l0": getattr(network.cell.cell, n) for n in names})
    x, h_0 = torch.randn(L, B, D).double(), torch.randn(B, H).double()
    return gradients(network, x, h_0), gradients(gru, x, h_0[None])


BELOW_L = [hb.Highway(k, gamma) for k in range(4) for gamma in (0.0, 0.3)]
BELOW_L += [hb.FixedPoint(2), hb.Highway(1, group_size=3)]
BELOW_L += [hb.TruncatedBPTT(window) for window in (1, 2, 3, 4)]


@pytest.mark.parametrize("method", BELOW_L, ids=str)
def test_with_a_gru_cell_it_is_hb_gru(method):
    torch.testing.assert_close(*with_a_gru_cell_and_of_hb_gru(method), rtol=1e-9, atol=1e-12)


def test_gradients_reach_the_initial_state():
    network, x = build("sLSTM", None)

    def of_the_state(network):
        torch.manual_seed(1)
        state = tuple((0.5 + torch.rand(B, H).double()).requires_grad_() for _ in range(4))
        network(x, state)[0].sum().backward()
        return [torch.zeros_like(s) if s.grad is None else s.grad for s in state]

    assert sum(bool(g.any()) for g in of_the_state(network)) >= 3
    assert_exact(network, of_the_state)


def test_a_hook_that_the_cell_sets_on_its_state():
    class Doubles(MinimalGatedCell):
        def forward(self, x, h):
            if h.requires_grad:
                h.register_hook(lambda g: 2 * g)
            return super().forward(x, h)

    network, x = hb.Recurrent(Doubles(D, H)).double(), torch.randn(L, B, D).double()
    state = torch.randn(B, H).double().requires_grad_()
    assert_exact(network, lambda network: gradients(network, x, state))


def test_a_setting_changed_since_the_forward_pass():
    class Gains(MinimalGatedCell):
        gain = 1.0

        def forward(self, x, h):
            return super().forward(x, self.gain * h)

    def run(network):
        loss = network(x, state)[0].square().sum()
        network.cell.gain = 0.5
        found = torch.autograd.grad(loss, list(network.parameters()))
        del network.cell.gain
        return found

    network, x = hb.Recurrent(Gains(D, H)).double(), torch.randn(L, B, D).double()
    state = torch.randn(B, H).double()
    assert_exact(network, run)


def with_hooks_on_parameters(network, x):
    for p in network.parameters():
        p.register_hook(lambda g: g / 2)
    return gradients(network, x)


def with_the_output_changed_in_place(network, x):
    return torch.autograd.grad(network(x)[0].mul_(2).square().sum(), list(network.parameters()))


def under_checkpoint(network, x):
    run = checkpoint(lambda x: network(x)[0], x, use_reentrant=False)
    return torch.autograd.grad(run.square().sum(), list(network.parameters()))


def with_other_weights(network, x):
    network.requires_grad_(False)
    weights = {n: (2 * p).requires_grad_() for n, p in network.named_parameters()}
    outputs, _ = functional_call(network, weights, (x,))
    return torch.autograd.grad(outputs.square().sum(), list(weights.values()))


def frozen_before_backward(network, x):
    loss = network(x)[0].square().sum()
    weights = list(network.parameters())
    network.requires_grad_(False)
    loss.backward()
    return [p.grad for p in weights]


SITUATIONS = [with_hooks_on_parameters, with_the_output_changed_in_place, under_checkpoint]
SITUATIONS += [with_other_weights, frozen_before_backward]


@every_cell
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("how", SITUATIONS)
def test_gradients_are_exact_in_every_situation(name, how, group_size):
    methods = hb.Backprop(), hb.Highway(L, group_size=group_size)
    found = [how(*build(name, method)) for method in methods]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


class Counts(MinimalGatedCell):
    def __init__(self):
        super().__init__(D, H)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, h):
        self.calls += 1
        return super().forward(x, h)


def test_buffers_of_the_cell_count_one_pass():
    network = hb.Recurrent(Counts(), method=hb.Highway(1))
    network(torch.randn(L, B, D), torch.zeros(B, H))[0].sum().backward()
    assert network.cell.calls == L


class Keeps(MinimalGatedCell):
    """Keeps what a function of its input, its state and the new state returns at each step."""

    def __init__(self, function):
        super().__init__(D, H)
        self.function, self.kept, self.last = function, [], None
        self.head = nn.Linear(D, 1)

    def forward(self, x, h):
        new = super().forward(x, h)
        self.last = self.function(self, x, h, new)
        self.kept.append(self.last)
        return new


@pytest.mark.parametrize("backward", ["loss.backward()", "autograd.grad"])
@pytest.mark.parametrize("step", [0, -1])
@pytest.mark.parametrize(
    "function",
    [
        lambda cell, x, h, new: new.square().mean(),
        lambda cell, x, h, new: cell.head(x).sum(),
        lambda cell, x, h, new: 2 * h.sum(),
    ],
    ids=["of the new state", "of the input", "of the state"],
)
def test_a_loss_on_what_a_cell_keeps_is_refused(function, step, backward):
    network = hb.Recurrent(Keeps(function), method=hb.Highway(1))
    outputs, _ = network(X.clone().requires_grad_(), ZEROS.clone().requires_grad_())
    loss = outputs.sum() + network.cell.kept[step]
    with pytest.raises(RuntimeError, match="a tensor that Keeps keeps, or that a hook inside it"):
        if backward == "autograd.grad":
            torch.autograd.grad(loss, next(network.parameters()))
        loss.backward()


def test_a_loss_on_what_a_hook_inside_a_cell_shows_is_refused():
    network, shown = hb.Recurrent(CELL, method=hb.Highway(1)), []
    handle = next(CELL.children()).register_forward_hook(lambda *call: shown.append(call[2]))
    loss = network(X, ZEROS)[0].sum() + shown[1].sum()
    with pytest.raises(RuntimeError, match="a tensor that MinimalGatedCell keeps, or that a hook"):
        loss.backward()
    handle.remove()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda cell, x, h, new: sum(p.square().sum() for p in cell.parameters()),
        lambda cell, x, h, new: cell.head(x.detach()).sum(),
        lambda cell, x, h, new: new.detach().mean() * cell.head.bias.sum(),
    ],
    ids=["of weights", "of the detached input", "of the detached state"],
)
def test_a_loss_on_what_a_cell_keeps_of_its_weights(function, before):
    """With the states in one backward pass, or in a second one; the loss is formed before both."""
    torch.manual_seed(0)
    network = hb.Recurrent(Keeps(function)).double()

    def run(network):
        network.zero_grad()
        network.cell.kept = []
        outputs, _ = network(X.double().requires_grad_(), ZEROS.double())
        losses = [outputs.square().sum(), sum(network.cell.kept) + network.cell.last]
        for loss in [sum(losses)] if before else losses:
            loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]

    assert_exact(network, run)


def test_the_graph_of_a_step_is_freed_with_the_step():
    clone = function(lambda ctx, h: h.clone(), lambda ctx, g: g)
    nodes, alive = [], []

    class Notes(MinimalGatedCell):
        def forward(self, x, h):
            alive.append(sum(ref() is not None for ref in nodes))
            h = clone(h)
            nodes.append(weakref.ref(h.grad_fn))
            return super().forward(x, h)

    outputs, _ = hb.Recurrent(Notes(D, H), method=hb.Highway(1))(X, ZEROS.clone().requires_grad_())
    assert alive == [0] * L
    outputs.sum().backward()


def test_a_cell_asks_whether_gradients_are_wanted():
    """As in backpropagation: not of an input, or a first state, that needs none."""
    asked = []

    class Asks(MinimalGatedCell):
        def forward(self, x, h):
            asked.append((x.requires_grad, h.requires_grad))
            return super().forward(x, h)

    for method in (hb.Backprop(), hb.Highway(L)):
        hb.Recurrent(Asks(D, H), method=method)(X, ZEROS)
    assert asked[:L] == asked[L:] == [(False, False), *[(False, True)] * (L - 1)]


class Forgets(nn.Module):
    """The new state depends on the input alone ("the state"), or on the state alone."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets, self.f = forgets, nn.Linear(H, H)

    def forward(self, x, h):
        return self.f(x.repeat(1, H // D)) if self.forgets == "the state" else torch.tanh(self.f(h))

    def carry(self, x, before, after):
        return 0.5


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("forgets", ["the state", "the input"])
def test_a_cell_that_forgets(forgets, group_size):
    network = hb.Recurrent(Forgets(forgets)).double()
    x, state = torch.randn(L, B, D).double().requires_grad_(), torch.randn(B, H).double()

    def run(network):
        loss = network(x, state)[0].square().sum()
        return torch.autograd.grad(loss, [x, *network.parameters()], materialize_grads=True)

    assert_exact(network, run, hb.Highway(L, group_size=group_size))


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_carry_that_is_nan_shows(group_size):
    class Nan(Forgets):
        def carry(self, x, before, after):
            return torch.full((H,), torch.nan)

    network = hb.Recurrent(Nan("the input"), method=hb.Highway(1, group_size=group_size))
    network(torch.randn(L, B, D), torch.randn(B, H))[0].sum().backward()
    assert network.cell.f.weight.grad.isnan().any()


class Returns(nn.Module):
    """What ``returned`` makes of the state."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x, h):
        return self.returned(h)

    def carry(self, x, before, after):
        return 0.5


SIZES = r"have sizes \[4, 4\]; expected \[4\], those of the state"
NO_SEQUENCE = r"expected \(L, B, I\) with L >= 1"


@pytest.mark.parametrize(
    ("cell", "x", "state", "error", "line"),
    [
        (Returns(lambda h: [h]), X, ZEROS, TypeError, "returns is a list; expected a tensor or a"),
        (Returns(lambda h: (h, None)), X, ZEROS, TypeError, "returns has a NoneType; expected a"),
        (Returns(lambda h: (h, h)), X, ZEROS, ValueError, SIZES),
        (Returns(lambda h: h[:, 1:]), X, ZEROS, ValueError, r"have sizes \[3\]; expected \[4\]"),
        (GRUCell(), X, None, TypeError, r"GRUCell has no initial_state\(B\)"),
        (CELL, X, [], TypeError, "state is a list; expected a tensor or a tuple"),
        (CELL, X, (None,), TypeError, "state has a NoneType; expected a tensor or a tuple"),
        (CELL, X, 0, TypeError, "state is a int; expected a tensor or a tuple"),
        (CELL, X[0], None, ValueError, NO_SEQUENCE),
        (CELL, X[:0], None, ValueError, NO_SEQUENCE),
        (CELL, X, ZEROS[:2], ValueError, rf"a state has shape \(2, {H}\)"),
    ],
)
def test_cells_states_and_inputs_that_do_not_fit(cell, x, state, error, line):
    with pytest.raises(error, match=line):
        hb.Recurrent(cell, method=hb.Highway(1))(x, state)


def test_a_carry_of_too_many_parts():
    network = hb.Recurrent(CELL, lambda x, a, b: (1.0, 1.0), hb.Highway(1))
    with pytest.raises(ValueError, match="carry of MinimalGatedCell has 2 parts; expected 1"):
        network(X)[0].sum().backward()


def test_set_method_reaches_all_kinds():
    recurrent = nn.ModuleList([hb.GRU(2, 2), hb.LSTM(2, 2), hb.Recurrent(MinimalGatedCell(D, H))])
    model = nn.Sequential(hb.ResidualChain([]), nn.ModuleDict({"inner": recurrent}))
    hb.set_method(model, hb.Highway(2))
    methods = [m.method for m in model.modules() if hasattr(m, "method")]
    assert methods == [hb.Highway(2)] * 4


@pytest.mark.parametrize("method", [hb.Backprop(), hb.Highway(1)], ids=str)
def test_a_last_state_may_be_detached_in_place(method):
    _, state = hb.Recurrent(CELL, method=method)(X, ZEROS)
    assert state.detach_().grad_fn is None
