"""States and arguments of converted layers that are not what they were: other memory, another
shape, attributes, nested tensors; and hooks of all modules."""

import pytest
import torch
from torch import nn

from tests.highway_bp.converted import (
    Net,
    Shows,
    assert_refused,
    assert_same,
    backward,
    both_methods,
    looping,
    made,
    rows,
)


@both_methods
def test_memory_of_a_state_is_replaced_between_layers(method):
    def loop(blocks, h):
        for block in blocks:
            h = block(h)
            h.data = h.data.clamp(-0.5, 0.5)
        return h

    assert_same(backward, looping(Shows, loop), method)


class Adds(Shows):
    def forward(self, h, more):
        return super().forward(h + more) * getattr(h, "factor", 1.0)


@pytest.mark.filterwarnings("ignore:.*a new chain begins there")
@both_methods
def test_memory_of_an_argument_is_replaced_between_layers(method):
    def loop(blocks, h):
        more = h.sin()
        for block in blocks:
            h = block(h, more)
            more.data = more.data * 0.5
        return h

    assert_same(backward, looping(Adds, loop), method)


@both_methods
def test_layers_see_attributes_of_their_state(method):
    def loop(blocks, h):
        for i, block in enumerate(blocks):
            h.factor = 1.0 + i
            h = block(h, 0.0)
        return h

    assert_same(backward, looping(Adds, loop), method)


class Queries(nn.Module):
    """q + f(memory), where q (1, 6) is broadcast to the batch by the first layer."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, q, memory):
        return q + torch.tanh(self.f(q) * memory)


class Decodes(Net):
    def __init__(self, layer=Queries):
        super().__init__(layer)
        self.query = nn.Parameter(torch.ones(1, 6))

    def forward(self, x):
        memory, h = self.emb(x), self.query
        for block in self.blocks:
            h = block(h, memory)
        return self.head(h).sin().sum()


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1)])
def test_a_first_batch_of_another_size(sizes):
    def run(model):
        for size in sizes:
            model(rows()[:size]).backward()

    assert_same(run, lambda: made(Queries, Decodes))


def test_a_nested_state_runs_outside_any_chain():
    def run(model):
        h = torch.nested.nested_tensor([rows()[:2], rows()], layout=torch.jagged)
        h = model.emb(h)
        for block in model.blocks:
            h = block(h)
        h.values().sin().sum().backward()

    with pytest.warns(UserWarning, match="does not get a floating tensor .that is not nested"):
        assert_same(run, made)


def test_a_backward_hook_of_all_modules_is_refused():
    hook = torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        assert_refused(made, "blocks.0 .* has a module backward hook")
    finally:
        hook.remove()
