"""Hooks that run after a gradient was accumulated."""

import torch
from torch import nn

import highway_bp as hb
from tests.highway_bp.converted import asserts_same, made, rows


@asserts_same(made, both=True)
def test_hooks_behind_an_accumulation_run_only_where_a_gradient_arrives(model):
    """Autograd runs them for the parameters of skipped layers, too, whose .grad is an old one."""
    calls = []

    def halve(p):
        p.grad.mul_(0.5)
        calls.append(p)

    unused = model.blocks[1].unused = nn.Parameter(rows()[0])
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    model().backward()
    model.blocks[2](model.blocks[0](model.emb(rows()))).square().sum().backward()
    assert unused.grad is None
    return [torch.tensor(float(len(calls)))]


@asserts_same(made, both=True)
def test_hooks_behind_an_accumulation_that_drop_the_gradient(model):
    """The chain has no gradient for the second layer's weights, and a loss on these has one."""
    calls = []

    def drop(p):
        calls.append(p)
        p.grad = None

    weights = list(model.blocks[1].parameters())
    for p in weights:
        p.register_post_accumulate_grad_hook(drop)
        p.register_post_accumulate_grad_hook(calls.append)
    out = model.blocks[2](model.blocks[0](model.emb(rows())))
    (out.square().sum() + sum(p.sum() for p in weights)).backward()
    return [torch.tensor(float(len(calls)))]


class Cell(nn.Module):
    """(tanh(h) + x W) / 2, and a weight that no step uses."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x, h):
        return (h.tanh() + self.linear(x)) / 2

    def carry(self, x, before, after):
        return 0.5


def test_hooks_behind_an_accumulation_in_a_recurrent_cell():
    for method in (hb.Backprop(), hb.Highway(9)):
        network, calls = hb.Recurrent(Cell(), method=method).double(), []
        network.cell.unused.grad = torch.ones(6).double()
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(calls.append)
        network(rows().unsqueeze(1), rows()[:1])[0].sum().backward()
        assert {id(p) for p in calls} == {id(p) for p in network.cell.linear.parameters()}
