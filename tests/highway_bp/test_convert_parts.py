"""Layers that are each given their own part of one tensor, as Gemma 3n's are."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import EXACT, IN_GROUPS, Net, Shows, assert_same, rows


class Scaled(Shows):
    def forward(self, h, part):
        return h + part.sigmoid() * self.g(self.inside(h))


CUTS = {
    "selected": lambda t: [t[:, i] for i in range(4)],
    "unbound": lambda t: t.unbind(1),
    "in chunks": lambda t: [c.squeeze(1) for c in t.chunk(4, 1)],
    "transposed": lambda t: [t.transpose(0, 1)[i] for i in range(4)],
    "one for all": lambda t: [t[:, :1].sum(1)] * 4,
    "overlapping": lambda t: [t.select(1, min(i, 1)) for i in range(4)],
    "expanded": lambda t: [t[0, i].expand(5, 6) for i in range(4)],
}
ONE_CHAIN = ("selected", "unbound", "one for all", "overlapping")


class Given(Net):
    def __init__(self, cut="selected", of="an activation"):
        super().__init__(Scaled)
        self.cut, self.of = CUTS[cut], of
        self.project, self.table = nn.Linear(6, 24), nn.Parameter(torch.randn(5, 4, 6))

    def forward(self, x=None):
        x = rows() if x is None else x
        h = self.emb(x)
        whole = self.table
        if self.of == "an activation":
            whole = self.project(x).unflatten(1, (4, 6)) * 2.0
        self.whole, self.parts = (whole,), self.cut(whole)
        for block, part in zip(self.blocks, self.parts, strict=True):
            h = block(h, part)
        return self.head(h).sin().sum()


def made(**settings):
    torch.manual_seed(0)
    return Given(**settings).double()


@pytest.mark.filterwarnings("ignore:.*a new chain begins there", "ignore:no chain of")
@pytest.mark.parametrize("method", [EXACT, IN_GROUPS], ids=str)
@pytest.mark.parametrize("of", ["an activation", "a parameter"])
@pytest.mark.parametrize("cut", CUTS)
def test_parts_of_one_tensor(cut, of, method):
    def run(model):
        model().backward()
        if cut in ONE_CHAIN and hasattr(model.blocks[0], "_trunk"):
            assert hb.chain_length(model) == 4

    assert_same(run, lambda: made(cut=cut, of=of), method)


def test_k_is_0_here():
    exact, model = made(), hb.convert(made(), hb.Highway(0))
    exact().backward()
    model().backward()
    assert hb.iterations(model) == 0
    assert not torch.allclose(model.project.weight.grad, exact.project.weight.grad)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there", "ignore:no chain of")
@pytest.mark.parametrize("hook", ["hook", "retain_grad", "on the whole", "whole retained"])
def test_hooks_on_parts_and_on_the_whole(hook):
    def run(model):
        seen = []
        make = model.cut

        def cut(whole):
            parts = make(whole)
            for t in [whole] if "whole" in hook else parts:
                t.retain_grad() if "retain" in hook else t.register_hook(seen.append)
            return parts

        model.cut = cut
        model().backward()
        watched = model.whole if "whole" in hook else model.parts
        return [t.grad for t in watched] if "retain" in hook else seen[::-1]

    def in_order(model):
        found = run(model)
        return sorted(found, key=lambda g: g.sum().item())

    assert_same(in_order, made)


def test_the_whole_is_used_outside_as_well_and_twice():
    def run(model):
        loss = model()
        (loss + model.whole[0].square().sum() * 0.1).backward(retain_graph=True)
        loss.backward()

    assert_same(run, made)


def test_a_part_that_a_layer_changes_in_place_is_refused():
    class Writes(Scaled):
        def forward(self, h, part):
            return super().forward(h, part.mul_(2.0))

    model = made()
    for block in model.blocks:
        block.__class__ = Writes
    hb.convert(model, hb.Highway(1))
    with pytest.raises(RuntimeError, match="in place"):
        model().backward()
