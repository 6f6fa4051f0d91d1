"""What tests of converted models share: the same done with an untouched model."""

import copy
import warnings
from functools import partial
from inspect import Parameter, Signature, signature

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.families import build, inputs

EXACT = hb.Highway(99)
IN_GROUPS = hb.Highway(99, group_size=2)
both_methods = pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
TOKENS = inputs("gpt2")


def logits_loss(model: nn.Module) -> torch.Tensor:
    return model(**TOKENS).loss


def backward(model: nn.Module) -> None:
    model().backward()


def with_states(model: nn.Module):
    return model(**TOKENS, output_hidden_states=True)


def assert_same(run, make=lambda: build("gpt2"), method=EXACT, tolerance=1e-9) -> nn.Module:
    """``run(model)`` computes gradients of parameters, and may return other tensors: all are those
    of the untouched model. Returns the converted one."""
    untouched = make()
    converted = hb.convert(copy.deepcopy(untouched), method)
    results = []
    for model in (untouched, converted):
        torch.manual_seed(1)
        shown = run(model) or []
        results.append((gradients(model), shown))
    (wanted, wanted_shown), (found, shown) = results
    assert found.keys() == wanted.keys() and wanted
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= tolerance * whole, name
    assert len(shown) == len(wanted_shown)
    for a, b in zip(shown, wanted_shown, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return converted


def checked(run, check, both=False):
    """A test ``check(run, method)`` of a function of a model, whose other arguments are the test's;
    whether by both methods."""

    def test(method=EXACT, **given):
        check(partial(run, **given), method)

    test.__name__, test.__doc__, test.__module__ = run.__name__, run.__doc__, run.__module__
    names = [*list(signature(run).parameters)[1:], *(["method"] if both else [])]
    test.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY) for n in names])
    return both_methods(test) if both else test


def asserts_same(make=lambda: build("gpt2"), both=False):
    """A test that what the function does with a model is the same on a converted one."""
    return lambda run: checked(run, lambda run, method: assert_same(run, make, method), both)


def refuses(line, make=lambda: build("gpt2"), method=EXACT):
    """A test that a converted model refuses what the function does with it."""
    return lambda run: checked(run, lambda run, _: assert_refused(make, line, run, method))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(found, exact) -> float:
    """Of the whole gradient; inf for gradients of other parameters."""
    if [g is None for g in found] != [g is None for g in exact]:
        return float("inf")
    pairs = [(f, e) for f, e in zip(found, exact, strict=True) if e is not None]
    wrong = sum((f - e).square().sum() for f, e in pairs)
    return (wrong / sum(e.square().sum() for _, e in pairs)).sqrt().item()


def rows():
    return torch.arange(30).double().sin().view(5, 6)


class Shows(nn.Module):
    """h + g(seen), with something of the inside kept in ``seen``."""

    def __init__(self):
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def inside(self, h):
        return torch.tanh(self.f(self.norm(h)))

    def forward(self, h):
        self.seen = self.inside(h)
        return h + self.scale.exp() * self.g(self.seen)


class Net(nn.Module):
    """Embedding, layers of one class, head; ``forward`` gives the head's loss and keeps the states.

    Others may give more arguments to all layers, and more of a loss on these.
    """

    def __init__(self, layer=Shows):
        super().__init__()
        self.emb, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x=None):
        h, given, self.states = self.emb(rows() if x is None else x), self.given(), []
        for block in self.blocks:
            h = block(h, *given)
            self.states.append(h)
        return self.head(h).sin().sum() + self.more(*given)

    def given(self):
        return ()

    def more(self, *given):
        return 0.0


def made(layer=Shows, net=Net):
    torch.manual_seed(0)
    return net(layer).double()


def function(forward, backward, **more):
    """The ``apply`` of a torch.autograd.Function."""
    methods = {"forward": forward, "backward": backward, **more}
    static = {name: staticmethod(method) for name, method in methods.items()}
    return type("Function", (torch.autograd.Function,), static).apply


# x, and in the backward pass the gradient 1 for a loss of its own.
add_loss = function(lambda ctx, x, loss: x.view_as(x), lambda ctx, g: (g, g.new_ones(())))


class Loop(Net):
    """Calls its layers by ``loop(blocks, h)``."""

    loop = None

    def forward(self, x=None):
        return self.head(type(self).loop(self.blocks, self.emb(rows()))).sin().sum()


def looping(layer, loop):
    torch.manual_seed(0)
    return lambda: type("Looping", (Loop,), {"loop": staticmethod(loop)})(layer).double()


def seen_in_loss(model, **how):
    loss = model()
    (loss + sum(block.seen.square().sum() for block in model.blocks)).backward(**how)


def assert_refused(make, line, run=backward, method=EXACT):
    with pytest.raises(RuntimeError, match=line), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(hb.convert(make(), method))
