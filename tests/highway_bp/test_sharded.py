"""Layers on P processes against the grouped chain in one process, in float64; and replicas of a
model, each with its layers on two processes."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import highway_bp as hb
from models.pair_classifier import PairClassifier
from models.resnet import ResNet
from scripts.transformer_layers import sublayers
from tests.highway_bp import test_sharded_models
from tests.highway_bp.architectures import ReluAfterSum, Scaled, Shortcut, tanh
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded_models import Case, gpt, losses, trained_alone

pytestmark = pytest.mark.slow

TOLERANCE = 1e-10
METHODS = [hb.Backprop(), hb.FixedPoint(1), hb.TruncatedBPTT(1), hb.Highway(0), hb.Highway(1)]
METHODS += [hb.Highway(2, gamma=0.3), hb.Highway(3, tolerance=0.5), hb.Highway(1, gamma="auto")]


CELLS = {
    "relu": lambda: ReluAfterSum(tanh(8)),  # a diagonal carry
    "halved": lambda: Scaled(tanh(8), 0.5),  # a number
    "mapped": lambda: Shortcut(tanh(8), nn.Linear(8, 8, bias=False)),  # which cannot be sent
}
KINDS = {
    "relu": ["relu"] * 5,
    "mapped": ["mapped"] * 5,
    "mixed": ["relu", "halved", "mapped", "relu", "halved"],
    "numbers": ["relu", "halved", "halved", "relu", "halved"],
    "seven": ["relu", "halved", "mapped"] * 2 + ["relu"],
}


def layers_of(kind: str) -> list[nn.Module]:
    torch.manual_seed(0)
    if kind == "gpt":
        return [layer.double() for layer in sublayers(6, 8, 2)]
    if kind == "resnet":
        return list(ResNet(depth=14, classes=3, preact=True).double().chain)
    return [CELLS[cell]().double() for cell in KINDS[kind]]


def data(kind: str):
    generator = torch.Generator().manual_seed(1)
    shape = (3, 16, 8, 8) if kind == "resnet" else (3, 4, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class InGroups:
    """A method in one process, with the groups that P processes would have."""

    layer = 0  # which is run now

    def __init__(self, method: hb.Method, sizes: list[int]):
        self.method, self._sizes = method, [size for size in sizes for _ in range(size)]

    @property
    def group_size(self) -> int:
        """Of the group that the layer before this one is in: it may be full."""
        return self._sizes[max(self.layer - 1, 0)]

    def solve(self, system):
        return self.method.solve(system)


class GroupedChain(hb.ResidualChain):
    def _cut(self, i, *args):
        if isinstance(self.method, InGroups):
            self.method.layer = i
        return super()._cut(i, *args)


def loss_on(states: list) -> torch.Tensor:
    """A loss on every state."""
    return sum((torch.sin(h) + h**2).sum() for h in states)


@cache
def expected(kind: str, method: hb.Method, P: int, everywhere: bool) -> dict[str, torch.Tensor]:
    layers = layers_of(kind)
    if not isinstance(method, hb.Backprop):
        sizes = [len(layers) // P + (r < len(layers) % P) for r in range(P)]
        method = InGroups(method, sizes)
    chain = GroupedChain(layers, method)
    x = data(kind).requires_grad_()
    states = chain(x, return_states=True)
    loss = loss_on(states if everywhere else states[-1:])
    loss.backward()
    return {"x": x.grad, "loss": loss.detach(), **{n: p.grad for n, p in chain.named_parameters()}}


def found(kind: str, method: hb.Method, everywhere: bool, settings: dict):
    """What this process has: its layers' gradients, and everybody's input's."""
    chain = hb.ShardedChain(layers_of(kind), method, **settings)
    x = data(kind).requires_grad_()
    loss = loss_on(chain(x, return_states=True) if everywhere else [chain(x)])
    loss.backward()
    own = {n: p.grad for n, p in chain.named_parameters() if int(n.split(".")[0]) in chain.own}
    assert len(own) == len(chain.own_parameters())
    return {"x": x.grad, "loss": loss.detach(), **own}


SETTINGS = [
    {"scan": "sequential"},
    {"scan": "doubling"},
    {"scan": "gathered"},
    {"micro_batches": 2},  # of 3 examples
    {"micro_batches": 3, "scan": "doubling"},
]
# Two grids of steps of 3 or of 2 groups, and three.
GRIDS = [hb.MGRIT(0, 3), hb.MGRIT(1, 2, 2, "F"), hb.MGRIT(1, 2, 2, "FCF"), hb.MGRIT(0, 2, 3)]


def cases(P: int):
    """Every method on every kind of layers, each in two settings, which take turns."""
    if P > 4:
        for kind, method, settings in itertools.product(("gpt", "seven"), GRIDS, SETTINGS[2:4]):
            yield kind, method, kind == "seven", settings
        return
    turn = itertools.count(P)
    for kind, method in itertools.product(("relu", "numbers", "mapped", "mixed", "gpt"), METHODS):
        for _ in range(2):
            yield kind, method, False, SETTINGS[next(turn) % 5]
    for method in METHODS:  # batch normalisation of a micro-batch is another
        yield "resnet", method, False, SETTINGS[next(turn) % 3]
    for method in (hb.Highway(0), hb.Highway(P - 1), hb.Backprop(), hb.FixedPoint(1)):
        for kind in ("gpt", "relu"):
            for _ in range(2):
                yield kind, method, True, SETTINGS[next(turn) % 5]
        yield "resnet", method, True, SETTINGS[0]


def compared_with_one(rank: int, P: int) -> tuple[int, list[str]]:
    """All cases: how many tensors were compared, and every difference above TOLERANCE."""
    # With NCCL lone messages and batches of them meet on different streams, and hang.
    dist.batch_isend_irecv = None
    wrong, compared = [], 0
    for kind, method, everywhere, settings in cases(P):
        if isinstance(method, hb.Highway) and method.k > P:
            continue  # warns
        reference = expected(kind, method, P, everywhere)
        if method == hb.Highway(P - 1):  # exact, but for what lies before the chain
            reference = {**expected(kind, hb.Backprop(), P, everywhere), "x": reference["x"]}
        for name, value in found(kind, method, everywhere, settings).items():
            compared += 1
            exact = reference[name]
            if (value - exact).abs().max() > TOLERANCE * (1 + exact.abs().max()):
                wrong.append(f"{kind} {method} {settings} {everywhere}: {name} on rank {rank}")
    return compared, wrong


@pytest.mark.parametrize("P", [1, 2, 3, 4, 6])
def test_every_method_is_that_of_the_grouped_chain(P, tmp_path):
    for compared, wrong in on_ranks(P, compared_with_one, tmp_path, P):
        assert wrong == []
        assert compared > (20 if P > 4 else 100)


# -- replicas -------------------------------------------------------------------------------------


def roberta() -> Case:
    """With a mask of its own for every example: the last tokens of some are left out."""
    torch.manual_seed(0)
    sizes = dict(layers=3, hidden=8, heads=2, length=6)
    model = PairClassifier(vocabulary=17, padding=1, labels=("a", "b", "c"), **sizes).double()
    x = torch.randint(2, 17, (8, 6))
    mask = torch.arange(6) < 3 + x[:, :1] % 4
    x = torch.stack([x.where(mask, 1), mask.long(), torch.zeros_like(x)], 1)
    return model.eval(), [3, 3], x, torch.arange(8) % 3  # eval: without dropout


CUT = [(gpt, 1), (gpt, 2), (roberta, 2)]  # micro-batches


def on_four(rank: int) -> tuple[list, list]:
    """Of every cut and method losses and norms, and weights; then the chains' gammas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layers"))
    layers, data = mesh["layers"].get_group(), mesh["data"].get_group()
    found = []
    for make, micro_batches in CUT:
        for method in test_sharded_models.METHODS:
            model, _, x, y = make()
            hb.set_method(model, method)
            hb.shard(model, layers, micro_batches=micro_batches)
            part = [t.chunk(2)[dist.get_rank(data)] for t in (x, y)]
            numbers = losses(model, hb.replicate(model, data), *part)
            numbers = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(numbers)
            found.append((numbers / 4, hb.whole_state_dict(model)))
    model, _, x, y = gpt()
    hb.set_method(model, hb.Highway(0, gamma="auto"))
    hb.shard(model, layers)
    losses(model, hb.replicate(model, data), *(t.chunk(2)[dist.get_rank(data)] for t in (x, y)))
    return found, hb.method_state(model)


def test_replicas_of_a_sharded_model_train_as_one_process(tmp_path):
    found, gammas = zip(*on_ranks(4, on_four, tmp_path), strict=True)
    assert gammas == gammas[:1] * 4  # or a resumed run would not be the same
    cases = [(make, method) for make, _ in CUT for method in test_sharded_models.METHODS]
    for i, (make, method) in enumerate(cases):
        expected, whole = trained_alone(make, method)
        for rank in range(4):
            numbers, weights = found[rank][i]
            assert numbers.tolist() == pytest.approx(expected, rel=1e-9)
            assert rank % 2 or weights.keys() == whole.keys()  # the first of a replica has all
            for key, value in weights.items():
                torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-8)
