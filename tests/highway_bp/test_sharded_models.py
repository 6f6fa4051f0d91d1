"""Whole models on several processes, step by step against one process with the same groups."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import highway_bp as hb
from models.decoder import Decoder
from models.resnet import ResNet
from tests.highway_bp.architectures import Plain, ReluAfterSum, tanh
from tests.highway_bp.families import build
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_advise import state_of

pytestmark = pytest.mark.slow

STEPS = 4
METHODS = [hb.Backprop(), hb.Highway(0), hb.Highway(1)]
Case = tuple[nn.Module, list[int], torch.Tensor, torch.Tensor]  # layers per process, input, target


def gpt() -> Case:
    """Embedding and classifier are tied."""
    torch.manual_seed(0)
    model = Decoder(vocabulary=17, layers=3, hidden=8, heads=2, length=6).double()
    x = torch.randint(17, (4, 6))
    return model, [3, 3], x, x.roll(-1, 1)


def resnet() -> Case:
    torch.manual_seed(0)
    model = ResNet(depth=14, classes=3, preact=True).double()
    return model, [3, 3], torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4) % 3


def convolution() -> nn.Module:
    return Plain(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()))


def two_chains() -> Case:
    """In channels-last memory, with a layer in between that all processes have."""
    torch.manual_seed(0)
    chains = [hb.ResidualChain(convolution() for _ in range(3)) for _ in range(2)]
    between = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(
        between[0], chains[0], between[1], chains[1], nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), [2, 1], x, torch.arange(4)


MODELS = {"gpt": gpt, "resnet": resnet, "two chains": two_chains}


def loss_of(x: torch.Tensor, y: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def losses(model: nn.Module, trained: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Of STEPS steps of AdamW with a clipped gradient, each followed by its norm.

    ``trained`` is called in the model's place: itself, or a wrapper of it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = loss_of(x, y)(trained)
        optimizer.zero_grad()
        loss.backward()
        norm = hb.total_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        found += [loss.item(), norm.item()]
    return found


def trained_alone(make: Callable[[], Case], method: hb.Method) -> tuple[list[float], dict]:
    """Losses and weights of one process with the groups of two."""
    model, sizes, x, y = make()
    if method != hb.Backprop():
        method = replace(method, group_size=sizes[0])
    hb.set_method(model, method)
    return losses(model, model, x, y), model.state_dict()


def trained_on_two(make: Callable[[], Case], method: hb.Method) -> tuple:
    """Layers of this process, and which ones have weights; losses; the whole state."""
    model, _, x, y = make()
    hb.set_method(model, method)
    chain, *_ = hb.shard(model)
    numbers = losses(model, model, x, y)
    state = copy.deepcopy(hb.whole_state_dict(model))  # the evaluation changes statistics
    here = [i for i, layer in enumerate(chain) if not any(p.is_meta for p in layer.parameters())]
    with torch.no_grad():  # evaluation goes through both processes, too
        assert model(x).isfinite().all()
    return list(chain.own), here, numbers, state


# -- errors of gradients --------------------------------------------------------------------------


def trained(*parts: str) -> Callable[[], Case]:
    """The GPT of which those halves alone are trained: a process may have none of them."""

    def make():
        model, *rest = gpt()
        for name, p in model.named_parameters():
            p.requires_grad = any(f"transformer.h.{part}." in name for part in parts)
        return model, *rest

    return make


# model, gamma; three of the GPT's six halves of layers are on the first process
ERRORS = {
    "gpt": (gpt, 0.1),
    "resnet": (resnet, 0.0),
    "gammas": (gpt, "auto"),
    "first": (trained("0", "1", "2"), 0.0),
    "last": (trained("3", "4", "5"), 0.0),
}


def errors(model: nn.Module, x, y, method: hb.Highway) -> list[dict]:
    """Errors at k = 0 and 1, in a model that has trained one step and is as it was afterwards."""
    hb.set_method(model, method)
    loss_of(x, y)(model).backward()
    before = state_of(model)
    found = [asdict(e) for e in hb.gradient_error(model, loss_of(x, y), (0, 1), method)]
    assert state_of(model) == before
    return [*found, hb.method_state(model)]


def adaptive_ks(model: nn.Module, x, y, method: hb.Highway) -> list:
    """The k of every step (-1: exact), and the error that was last measured."""
    schedule = hb.schedules.Adaptive(method, tolerance=0.01, ks=(0, 1), budget=0.9, exact_from=0.9)
    optimizer, ks, steps = torch.optim.SGD(model.parameters(), lr=0.5), [], 16
    for step in range(steps):
        chosen = schedule.method_for(
            step, steps, lambda m, ks: hb.gradient_error(model, loss_of(x, y), ks, m)
        )
        ks.append(getattr(chosen, "k", -1))
        hb.set_method(model, chosen)
        optimizer.zero_grad()
        loss_of(x, y)(model).backward()
        optimizer.step()
    return [ks, schedule.state_dict()["errors"]]


def assert_close(found, expected) -> None:
    """Nested lists and dicts of numbers."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


# -- weights --------------------------------------------------------------------------------------


class Net(nn.Module):
    """A chain of four layers between two others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.chain = hb.ResidualChain((ReluAfterSum(tanh(8)) for _ in range(4)), hb.Highway(1))

    def forward(self, x):
        return self.last(self.chain(self.first(x)))


def bytes_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.is_meta)


def shared_and_collected() -> tuple:
    """Bytes of layers, shapes, the whole state; and that of a model which has loaded another
    state, in other shares."""
    model, again = Net(), Net()
    outside = bytes_of(model) - bytes_of(model.chain)
    hb.shard(model)
    hb.shard(again, sizes=[1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hb.load_whole_state_dict(again, other(Net().state_dict()))
    shapes = [p.shape for p in model.parameters()]
    states = hb.whole_state_dict(model), hb.whole_state_dict(again)
    return bytes_of(model) - outside, shapes, *states


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


def refused(rank: int) -> list[str]:
    """What `shard` says of models that cannot be shared out, and of one that can."""
    lines = []
    for which in ("weights", "layers of two", "outside", "layers of one"):
        net = Net()
        if which == "weights":
            net.chain[2].inner[0].bias.data += rank
        elif which == "layers of two":
            net.chain[3].inner[0].weight = net.chain[0].inner[0].weight
        elif which == "outside":
            net.chain[3].inner[0].weight = net.first.weight
        else:
            net.chain[1].inner[0].weight = net.chain[0].inner[0].weight
        try:
            hb.shard(net)
            lines.append("nothing")
        except ValueError as error:
            lines.append(str(error))
    return lines


def nothing_to_train() -> tuple[bool, bool]:
    """Whether `replicate` has left the model alone, and whether its second layer has a gradient."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "layers"))
    torch.manual_seed(0)
    model = nn.Sequential(hb.ResidualChain((convolution() for _ in range(2)), hb.Highway(0)))
    model[0][0].requires_grad_(False)
    hb.shard(model, mesh["layers"].get_group())
    trained = hb.replicate(model, mesh["data"].get_group())
    trained(torch.randn(2, 4, 5, 5)).square().mean().backward()
    return trained is model, model[0][1].inner[0].weight.grad is not None


# -- on two processes -----------------------------------------------------------------------------


def on_two(rank: int) -> dict:
    """All of the above, by name."""
    found = {"refused": refused(rank), "nothing": nothing_to_train()}
    for name, make in MODELS.items():
        for method in METHODS:
            found[f"{name} {method}"] = trained_on_two(make, method)
    for name, (make, gamma) in ERRORS.items():
        model, _, x, y = make()
        hb.shard(model)
        found[name] = errors(model, x, y, hb.Highway(1, gamma))
    model, _, x, y = gpt()
    hb.shard(model)
    found["ks"] = adaptive_ks(model, x, y, hb.Highway(0))
    with pytest.raises(ValueError, match="advise measures one process"):
        hb.advise(model, None, lambda model, _: loss_of(x, y)(model))
    found["collected"] = shared_and_collected()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return on_ranks(2, on_two, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one_with_their_groups(two, name):
    for method in METHODS:
        expected, weights = trained_alone(MODELS[name], method)
        sizes = MODELS[name]()[1]
        for rank in range(2):
            own, here, numbers, _ = two[rank][f"{name} {method}"]
            assert len(own) == sizes[rank] and here == own
            assert numbers == two[0][f"{name} {method}"][2]
            assert numbers == pytest.approx(expected, rel=1e-9)
            assert numbers == expected or name == "two chains" or method == hb.Highway(1)
        state = two[0][f"{name} {method}"][-1]
        assert list(state) == list(weights)
        for parameter, value in weights.items():
            torch.testing.assert_close(state[parameter], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ERRORS)
def test_two_processes_find_the_errors_of_one_with_their_groups(two, name):
    make, gamma = ERRORS[name]
    model, sizes, x, y = make()
    expected = errors(model, x, y, hb.Highway(1, gamma, group_size=sizes[0]))
    assert expected[0]["relative_error"] > 0.01 or name == "last"  # its groups are exact
    assert repr(two[0][name]) == repr(two[1][name])
    assert_close(two[0][name], expected)


def test_an_adaptive_schedule_takes_the_same_ks(two):
    model, sizes, x, y = gpt()
    expected = adaptive_ks(model, x, y, hb.Highway(0, group_size=sizes[0]))
    assert {0, 1, -1} == set(expected[0])
    assert two[0]["ks"] == two[1]["ks"]
    assert_close(two[0]["ks"], expected)


def test_each_process_has_its_own_weights_and_a_checkpoint_has_all(two):
    whole = Net()
    expected = whole.state_dict()
    for rank, found in enumerate(two):
        size, shapes, state, again = found["collected"]
        assert size == bytes_of(whole.chain[2 * rank : 2 * rank + 2])
        assert shapes == [p.shape for p in whole.parameters()]
        for collected, wanted in ((state, expected), (again, other(expected))):
            assert rank or list(collected) == list(wanted)  # the first one has all
            assert all(torch.equal(t, wanted[name]) for name, t in collected.items())


def test_models_that_cannot_be_shared_out_are_refused(two):
    assert two[0]["refused"] == two[1]["refused"]
    weights, layers, outside, one = two[0]["refused"]
    assert weights.startswith(
        "processes have different models, first in chain.2.inner.0.bias; expect"
    )
    assert layers.startswith(
        "chain.0.inner.0.weight = chain.3.inner.0.weight is shared by layers of dif"
    )
    assert outside.startswith("first.weight = chain.3.inner.0.weight is shared by")
    assert one == "nothing"
    with pytest.raises(ValueError, match="GRU has time steps, not layers of its own"):
        hb.shard(hb.GRU(3, 4))
    with pytest.raises(ValueError, match="Linear holds no ResidualChain; expected a model whose"):
        hb.shard(nn.Linear(3, 4))


def test_a_process_without_anything_to_train_is_not_wrapped(two):
    assert [rank["nothing"] for rank in two] == [(True, False), (False, True)]


def test_a_model_of_one_process_has_its_state_dict():
    net = Net()
    state = hb.whole_state_dict(net)
    assert list(state) == list(net.state_dict())
    assert not any(t.requires_grad for t in state.values())


def test_a_converted_model_is_refused():
    model = hb.convert(build("gpt2"), hb.Highway(1))
    with pytest.raises(ValueError, match=r"h: 3 x GPT2Block.*is a converted trunk.*ResidualChain"):
        hb.shard(model)
