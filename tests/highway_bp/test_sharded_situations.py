"""Layers on processes: looks, precision, arguments, and what is refused."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import highway_bp as hb
from scripts.transformer_layers import sublayers
from tests.highway_bp.architectures import Masked, Plain, tanh
from tests.highway_bp.on_ranks import on_ranks
from tests.highway_bp.test_sharded import CELLS, GroupedChain, InGroups, data, layers_of, loss_on

pytestmark = pytest.mark.slow


def said(call, *given, error=RuntimeError, **named) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(error) as told:
        call(*given, **named)
    return str(told.value)


def chain_of(layer: type[nn.Module], layers: int = 2) -> hb.ShardedChain:
    return hb.ShardedChain([layer(tanh(8)).double() for _ in range(layers)], hb.Highway(1))


def assorted(rank: int) -> dict:
    """What else there is to see on two processes, by name."""
    return {
        "bfloat16": in_half_precision(),
        "arguments": with_arguments(),
        "disagreeing": disagreeing(rank),
        "alone": forward_alone(),
        "twice": backward_twice(),
        "unwanted": unwanted_input(),
        "captured": captured(),
        "written": written(),
        "kept": kept(),
        "accumulates": accumulates(),
        "looked at": looked_at(),
        "shared": shared(),
        "carries": carries_at_first_unseen(rank),
    }


def shared() -> str:
    """The error of a layer that two processes have, where it is trained."""
    layer = Plain(tanh(8)).double()
    chain = hb.ShardedChain([layer] * 4, hb.Highway(1))
    with torch.no_grad():
        assert torch.equal(chain(data("relu")), hb.ResidualChain([layer] * 4)(data("relu")))
    return said(chain, data("relu"), error=ValueError)


def carries_at_first_unseen(rank: int) -> float:
    """The error of a gradient whose input alone needs the first process's diagonal carries."""
    layers = [*layers_of("relu")[:2], *(Plain(tanh(8)).double() for _ in range(2))]
    chain, x = hb.ShardedChain(layers, hb.Highway(2)), data("relu")
    chain(x).sum().backward()
    found, exact = (
        torch.autograd.grad(each(x.requires_grad_()).sum(), x)[0]
        for each in (chain, hb.ResidualChain(layers))
    )
    return (found - exact).abs().max().item()


def looked_at() -> list[str]:
    """What is said to a look at a state before the last one; one at the last state is exact."""

    def states():
        return hb.ShardedChain(layers_of("relu"), hb.Highway(1))(data("relu"), return_states=True)

    def look(how, at):
        loss = loss_on(found := states())
        if how == "grad":
            torch.autograd.grad(loss, found[at])
        elif how == "hook":
            found[at].register_hook(lambda g: None)
        else:
            found[at].retain_grad()
        loss.backward()

    looks = itertools.product(("grad", "hook", "retain_grad"), (0, 3))
    lines = [said(look, how, at) for how, at in looks]
    (g,) = torch.autograd.grad((found := states())[-1].square().sum(), found[-1])
    assert torch.equal(g, 2 * found[-1])
    return lines


def in_half_precision() -> list[float]:
    """Of every gradient the largest error, over its largest entry."""
    errors = []
    for micro_batches in (1, 2):
        torch.manual_seed(0)
        layers = sublayers(6, 8, 2)
        whole = GroupedChain(layers, InGroups(hb.Highway(0), [3, 3]))
        chain = hb.ShardedChain(layers, hb.Highway(0), micro_batches=micro_batches)
        gradients = []
        for each in (whole, chain):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                h = each(data("gpt").float())
            torch.sin(h).sum().backward()
            gradients.append([p.grad.clone() for p in chain.own_parameters()])
        errors += [
            ((found - exact).abs().max() / exact.abs().max()).item()
            for exact, found in zip(*gradients, strict=True)
        ]
    return errors


def masked_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Plain(Masked(8)).double() for _ in range(4)]


def with_arguments() -> list[tuple]:
    """Gradients of an argument, cut into micro-batches and whole: in one process, and here."""
    pairs = []
    for micro_batches in (1, 2):
        sharded = hb.ShardedChain(masked_layers(), hb.Highway(1), micro_batches=micro_batches)
        of_each = []
        for chain in (hb.ResidualChain(masked_layers()), sharded):
            mask = torch.arange(3.0).double().view(3, 1, 1).requires_grad_()
            chain(data("relu"), mask, scale=0.5).square().sum().backward()
            of_each.append(mask.grad)
        pairs.append(tuple(of_each))
    return pairs


def disagreeing(rank: int) -> list[str]:
    """The errors of calls that cannot be."""
    chain = hb.ShardedChain(masked_layers(), hb.Highway(1), micro_batches=2)
    mask = torch.ones(3, 1, 1)
    call = partial(chain, scale=0.5)
    batches = data("relu")[:1], data("relu")[: 2 + rank]
    errors = [said(call, x, mask, error=ValueError) for x in batches]
    chain.method = hb.Highway(rank)
    with torch.no_grad():
        errors.append(said(call, data("relu"), mask, error=ValueError))
    chain.method = hb.Highway(1)
    return [*errors, said(call, data("relu") + 0.1 * rank, mask, error=ValueError)]


def forward_alone() -> tuple[bool, float, bool]:
    """Whether a batch smaller than the micro-batches goes through; the next random number; whether
    a graph without a backward pass has gone with its output."""
    layers = [nn.Sequential(CELLS["relu"](), nn.Dropout(0.5)) for _ in range(3)]
    chain = hb.ShardedChain(layers, hb.Highway(0), micro_batches=4)
    with torch.inference_mode():
        fine = bool(chain(torch.randn(2, 5, 8)).isfinite().all())
    h = chain(torch.randn(4, 5, 8))  # dropout draws for own layers alone
    gone = weakref.ref(h.grad_fn)
    gc.collect()
    gc.disable()
    del h
    gc.enable()
    return fine, torch.rand(()).item(), gone() is None


def backward_twice() -> tuple[bool, str]:
    """Whether a second backward pass finds the same gradient; the error of a third one."""
    chain = hb.ShardedChain(layers_of("relu"), hb.Highway(1))
    loss, p = chain(data("relu")).sum(), chain.own_parameters()[0]
    first, second = (torch.autograd.grad(loss, p, retain_graph=keep)[0] for keep in (True, False))
    return torch.equal(first, second), said(loss.backward)


def unwanted_input() -> list[float]:
    """Errors of gradients that are exact, where nobody wants the input's; one gamma per group."""
    chain = hb.ShardedChain(layers_of("gpt"), hb.Highway(1, gamma="auto"), scan="doubling")
    whole = hb.ResidualChain(layers_of("gpt"))
    for each in (chain, whole):
        each(data("gpt")).square().sum().backward()
    exact = [p for i in chain.own for p in whole[i].parameters()]
    pairs = zip(chain.own_parameters(), exact, strict=True)
    return [(p.grad - q.grad).abs().max().item() for p, q in pairs]


def captured() -> str:
    """The error of layers that use a tensor which would get no gradient."""
    scale = torch.ones(8, dtype=torch.float64, requires_grad=True)

    class Captures(Plain):
        def g(self, h):
            return scale * self.inner(h)

    return said(chain_of(Captures), data("relu"))


def kept() -> list[str]:
    """The errors of a loss on a tensor that a layer keeps, and of a look at its gradient."""

    class Keeps(Plain):
        def g(self, h):
            self.inside = self.inner(h)
            return self.inside

    chain, x = chain_of(Keeps), data("relu").requires_grad_()
    loss = chain(x).sum() + chain[chain.own[0]].inside.sum()
    errors = [said(torch.autograd.grad, loss, x, retain_graph=True)]
    for look in (lambda t: t.retain_grad(), lambda t: t.register_hook(lambda g: None)):
        loss = chain(x).sum()
        look(chain[chain.own[0]].inside)
        errors.append(said(loss.backward))
    return errors


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight):
        ctx.weight = weight
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.weight is not None:
            ctx.weight.main_grad = g.sum()
        return g + 1, None


def accumulates() -> list[str]:
    """The errors of layers whose backward pass writes a weight's gradient itself, or adds to the
    gradient while a loss uses a state inside a process's group."""

    class Accumulates(Plain):
        fused = True

        def g(self, h):
            return Fused.apply(self.inner(h), next(self.parameters()) if self.fused else None)

    class Adds(Accumulates):
        fused = False

    errors = []
    for layer in (Accumulates, Adds):
        states = chain_of(layer, 4)(data("relu").requires_grad_(), return_states=True)
        loss = sum(h.sum() for h in (states if layer is Adds else states[-1:]))
        errors.append(said(loss.backward))
    return errors


def written() -> str:
    """The error of layers that write into a list, which is another on every process."""

    class Writes(Plain):
        def forward(self, h, losses):
            losses.append(self.inner(h).square().mean())
            return super().forward(h)

    return said(chain_of(Writes), data("relu"), [])


def test_what_else_there_is_to_see(tmp_path):
    first, second = on_ranks(2, assorted, tmp_path)
    for rank in (first, second):
        assert len(rank["bfloat16"]) > 10 and max(rank["bfloat16"]) <= 0.03
        for exact, found in rank["arguments"]:
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
        assert len(rank["unwanted"]) > 5 and max(rank["unwanted"]) < 1e-10
        assert rank["twice"][0] and "second time: their graphs are freed" in rank["twice"][1]
        assert rank["captured"].startswith(tuple(f"layer {i} (Captures) uses a" for i in (0, 1)))
        assert "(Writes) writes into a list or dictionary that it is given" in rank["written"]
        loss, *looks = rank["kept"]
        assert loss.startswith("a loss uses a tensor inside a layer of a ShardedChain")
        assert len(looks) == 2 and all("a hook or retain_grad on a tensor" in s for s in looks)
        writes, adds = rank["accumulates"]
        assert "(Accumulates) writes the gradients of parameters itself" in writes
        assert "(Adds) adds to the gradient in its backward pass" in adds
        assert rank["shared"].startswith("a parameter is shared by layers of different processes")
        assert rank["carries"] < 1e-10
        assert len(rank["looked at"]) == 6
        assert all(
            "gradient of a state inside a ShardedChain" in said for said in rank["looked at"]
        )
    assert first["alone"] == second["alone"] and first["alone"][0] and first["alone"][2]
    assert first["disagreeing"] == second["disagreeing"]
    small, shape, method, state = first["disagreeing"]
    assert small.startswith("micro_batches=2 for a state of shape (1, 4, 8); expected at most")
    assert "called on rank 1 with a state of torch.float64 [3, 4, 8], Highway(k=1" in shape
    assert "on rank 0 with a state of torch.float64 [2, 4, 8], Highway(k=1" in shape
    assert "Highway(k=0, gamma=0.0, group_size=1, tolerance=None), sizes=[2, 2], micro" in method
    assert state.startswith("rank 1 passes another state to the ShardedChain than rank 0")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"micro_batches": 0}, "micro_batches=0; expected"),
        ({"micro_batches": 1.5}, "micro_batches=1.5; expected"),
        ({"micro_batches": True}, "micro_batches=True; expected"),
        ({"scan": "blocked"}, "scan='blocked'; expected one of auto, sequential, doubling, gath"),
        ({"sizes": [2]}, r"sizes=\[2\]; expected 1 numbers of at least 1, 1 in all"),
        ({"method": hb.Highway(1, group_size=2)}, "group_size=2 in a ShardedChain; expected 1"),
    ],
)
def test_bad_settings(one_process, settings, line):
    with pytest.raises((TypeError, ValueError), match=line):
        hb.ShardedChain([nn.Identity()], **settings)


def test_without_processes_there_is_a_clear_line():
    with pytest.raises(RuntimeError, match="started by torchrun"):
        hb.ShardedChain([nn.Identity()])
