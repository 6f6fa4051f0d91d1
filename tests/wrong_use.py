"""Wrong use of the library, by situation: what tests/errors.md says of each is what it raises."""

import torch
from torch import nn

import highway_bp as hb
from experiments.errors import UserError
from models.cells import MinimalGatedCell
from scripts import run_plan
from tests.highway_bp.families import build
from tests.highway_bp.test_recurrent_refuses import Decay


class Add(nn.Module):
    """h + h, with the carry it is given."""

    def __init__(self, carry):
        super().__init__()
        self.value = carry

    def forward(self, h):
        return h + h

    def carry(self, h_in, h_out):
        return self.value


class OneArgument(nn.Linear):
    def carry(self, h):
        return h


class Narrow(nn.Module):
    def forward(self, h):
        return h[..., :2]


class Pair(nn.Module):
    def forward(self, h):
        return h, None


class InPlace(nn.Module):
    def forward(self, h):
        return h.add_(1.0)


class Captures(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weights = [weight]

    def forward(self, h):
        return h + h * self.weights[0]


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, h):
        return h * self.blocks[0][0].bias


METHOD = hb.Highway(1)
OUTSIDE = torch.ones(4, requires_grad=True)
X = torch.randn(5, 2, 3)  # L, B, I
TOKENS = torch.ones(1, 3, dtype=torch.int64)


def backward(*layers: nn.Module, width: int = 4):
    x = torch.randn(2, width, requires_grad=True)
    hb.ResidualChain(layers, METHOD)(x).sum().backward()


def with_carry(carry):
    backward(Add(carry), Add(None))


def backward_of_cell(*cell_and_carry):
    total(hb.Recurrent(*cell_and_carry, method=METHOD)).backward()


def total(rnn: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    return rnn(x)[0].sum()


def gru() -> nn.Module:
    return hb.GRU(3, 4, method=METHOD)


def a_llama() -> nn.Module:
    return build("llama")


def converted(model: nn.Module | None = None, **settings) -> nn.Module:
    return hb.convert(a_llama() if model is None else model, METHOD, **settings)


def hooked() -> nn.Module:
    model = converted()
    model.model.layers[0].register_full_backward_hook(lambda *_: None)
    return model


def reentrant() -> nn.Module:
    model = converted().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def batched_gradients():
    output, two = (rnn := gru())(X)[0], torch.ones(2, 5, 2, 4)
    torch.autograd.grad(output, list(rnn.parameters()), two, is_grads_batched=True)


def second_derivative():
    x = X.clone().requires_grad_()
    torch.autograd.grad(total(gru(), x), x, create_graph=True)


RAISED = {
    ValueError: {
        "a carry of the wrong shape": lambda: with_carry(torch.ones(3)),
        "a layer that changes the shape with an identity carry": lambda: backward(
            Narrow(), Add(None)
        ),
        "a recurrent layer with an unknown carry": lambda: hb.LSTM(3, 4, carry="forget"),
        "an LSTM with a projection": lambda: hb.LSTM(3, 4, proj_size=2, method=METHOD),
        "a length of zero": lambda: hb.GRU(3, 4)(X, lengths=[5, 0]),
        "a length beyond the input": lambda: hb.GRU(3, 4)(X, lengths=[6, 1]),
        "too few lengths": lambda: hb.GRU(3, 4)(X, lengths=[5]),
        "lengths and windows in an LSTM": lambda: hb.LSTM(3, 4, method=hb.Highway(1, group_size=2))(
            X, lengths=[5, 1]
        ),
        "a cell whose carry has the wrong shape": lambda: backward_of_cell(
            MinimalGatedCell(3, 4), lambda x, before, after: torch.ones(5)
        ),
        "a scan of one number": lambda: hb.cumsumprod(torch.tensor(1.0)),
        "milestones of no k": lambda: hb.schedules.Milestones(METHOD, ks=[], at=[]),
        "a model without a chain": lambda: hb.set_method(nn.Linear(3, 4), METHOD),
        "a model whose trunk is not known": lambda: converted(nn.Linear(3, 3)),
        "a trunk by a name that is not there": lambda: converted(layers="layers"),
        "a compiled model": lambda: converted(torch.compile(a_llama())),
        "a model with lazy modules": lambda: converted(
            nn.Sequential(nn.Sequential(nn.LazyLinear(4)), nn.Sequential(nn.LazyLinear(4))),
            layers="",
        ),
        "a model wrapped for several devices": lambda: converted(nn.DataParallel(a_llama())),
        "a model converted twice": lambda: hb.convert(converted(), hb.Highway(2)),
        "reentrant checkpointing": lambda: reentrant()(input_ids=TOKENS),
        "advice on a loss that is no scalar": lambda: hb.advise(
            hb.GRU(3, 4), X, lambda m, x: m(x)[0]
        ),
        "advice without a k to try": lambda: hb.advise(hb.GRU(3, 4), X, total, ks=()),
        "gamma auto in a recurrent layer": lambda: hb.GRU(3, 4, method=hb.Highway(1, "auto")),
        "the estimated error of a method without iterations": lambda: hb.estimated_error(
            hb.GRU(3, 4), total, method=hb.Backprop()
        ),
        "the gradient error of a method without iterations": lambda: hb.gradient_error(
            hb.ResidualChain([Add(None)]), sum, method=hb.Backprop()
        ),
        "a model that never runs the layers it was converted by": lambda: hb.gradient_error(
            converted(Unused(), layers="blocks"), lambda m: m(X).sum()
        ),
    },
    TypeError: {
        "a carry of the wrong dtype": lambda: with_carry(torch.ones(4, dtype=torch.int64)),
        "a carry of another type": lambda: with_carry("ones"),
        "a method carry with other arguments": lambda: backward(OneArgument(4, 4), Add(None)),
        "a layer in place of a list": lambda: hb.ResidualChain(nn.Linear(3, 3), METHOD),
        "a state of complex numbers": lambda: hb.ResidualChain([Add(None)], METHOD)(
            torch.ones(2, 4, dtype=torch.cfloat, requires_grad=True)
        ),
        "a layer that returns a tuple": lambda: backward(Pair(), Add(None)),
        "lengths that are no whole numbers": lambda: hb.GRU(3, 4)(X, lengths=[5.0, 1]),
        "a recurrent layer with what is no method": lambda: hb.GRU(3, 4, method="bp"),
        "a cell without a carry": lambda: hb.Recurrent(nn.Linear(3, 4)),
        "a scan of whole numbers": lambda: hb.cumsumprod(torch.arange(3)),
        "a scan with one carry": lambda: hb.cumsumprod(X, hb.Scalar(0.5)),
        "a schedule of no method": lambda: hb.schedules.Constant(3),
        "a method state that is none": lambda: hb.load_method_state(converted(), {"a": 1}),
        "a trunk by its layers": lambda: converted(layers=nn.Linear),
        "an error of a loss that is a models output": lambda: hb.gradient_error(
            hb.GRU(3, 4), lambda m: m(X)
        ),
        "a gamma that is an unknown word": lambda: hb.Highway(1, gamma="best"),
    },
    RuntimeError: {
        "a layer that changes its input in place": lambda: backward(InPlace()),
        "a layer that uses what is no parameter of the chain": lambda: backward(
            Captures(torch.ones(3, requires_grad=True)), width=3
        ),
        "a layer that uses what was computed outside": lambda: backward(
            Add(None), Captures(2 * OUTSIDE)
        ),
        "a cell with dropout": lambda: backward_of_cell(Decay(3, 4, nn.Dropout(0.5))),
        "a cell with batch normalisation": lambda: backward_of_cell(Decay(3, 4, nn.BatchNorm1d(4))),
        "a recurrent layer in a transform": lambda: torch.func.grad(lambda x: total(gru(), x))(X),
        "batched gradients": batched_gradients,
        "a second derivative through a chain": second_derivative,
        "a module backward hook on a layer": lambda: hooked()(input_ids=TOKENS),
    },
    UserError: {"a plan of an unknown experiment": lambda: run_plan.main(["resnet23"])},
}
