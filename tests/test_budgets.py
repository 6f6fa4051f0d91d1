"""What a forward and backward pass may cost: operations and memory, which may only fall.

A GPU launches operations one by one. They are counted as aten operations on the CPU, without views,
in the second pass: the first checks more.
"""

from collections import Counter

import pytest
import torch
from hydra.utils import instantiate
from torch.utils._python_dispatch import TorchDispatchMode

import highway_bp as hb
from experiments.config import composed
from models.resnet import ResNet
from scripts.benchmark import tensor_peak
from scripts.surrogate import surrogate

GRU = "model=gru_char model.hidden=16 data.length=1024"
LSTM = "model=lstm_char model.hidden=16 data.length=256"
RESNET = "model=resnet32_preact"
GPT2 = "model=gpt2_small model.layers=3 data.length=16"
CASES = [  # lower a number where fewer are needed
    (GRU, hb.Highway(0), 150),
    (GRU, hb.Highway(5), 488),
    (LSTM, hb.Highway(0), 173),
    (LSTM, hb.Highway(5), 367),
    (RESNET, hb.Backprop(), 423),
    (RESNET, hb.Highway(0), 408),
    (RESNET, hb.Highway(3), 855),
    (GPT2, hb.Backprop(), 155),
    (GPT2, hb.Highway(0), 149),
    (GPT2, hb.Highway(3), 302),
]


class Counting(TorchDispatchMode):
    """Counts what is no view, and by name for the message."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.found[op.name()] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("line", "method", "budget"), CASES, ids=str)
def test_operations_per_step(line, method, budget):
    cfg = composed(*line.split())
    data = surrogate(cfg.data, rows=16)
    model = instantiate(cfg.model, **data.model_arguments()).train()
    hb.set_method(model, method)
    batch = data.train_batches(2, 0, "cpu").batch(0)
    for _ in range(2):
        model.zero_grad()
        with Counting() as counted:
            data.task.loss(model, *batch)[0].backward()
    assert counted.found.total() <= budget, counted.found.most_common(8)


@pytest.mark.parametrize(("preact", "at_k_0"), [(True, 1.2), (False, 1.3)], ids=str)
def test_memory_of_at_most_two_states_per_layer_more_than_backpropagation(preact, at_k_0):
    """The claim of the paper's appendix D; the states of all layers are equally large here."""
    layers = list(ResNet(depth=32, preact=preact, classes=10).chain)
    x = torch.randn(8, 16, 32, 32, requires_grad=True)

    def peak(method: hb.Method) -> int:
        chain = hb.ResidualChain(layers, method)

        def step() -> None:
            chain.zero_grad()
            chain(x).sum().backward()

        return tensor_peak(step)

    plain, states = peak(hb.Backprop()), len(layers) * x.nbytes
    more = [(peak(hb.Highway(k)) - plain) / states for k in (0, 2)]
    assert more[0] < at_k_0 and more[1] < 2.0, more
