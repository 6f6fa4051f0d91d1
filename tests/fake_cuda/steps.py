"""Training steps on a device that computes nothing, run by `test_fake_cuda` in its own process.

Fails where tensors of two devices meet, where cuDNN is given what it refuses, and where the host
waits for the device more often than `waits_of` says.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import highway_bp as hb
from experiments.config import CONFIGS, composed
from experiments.data.images import ImageData
from experiments.objective import Objective
from experiments.optimizer import build_optimizer
from experiments.trainer import Trainer
from scripts.surrogate import one_pass, surrogate, training_step
from tests.fake_cuda.gpu import FakeGPU
from tests.test_devices import METHODS, MODELS
from tests.train_cli import planned

DEVICE = torch.device("cuda")


@pytest.fixture
def gpu():
    with FakeGPU() as gpu:
        yield gpu


def second_step(
    gpu: FakeGPU, name: str, method: hb.Method, amp: bool
) -> tuple[nn.Module, list[str]]:
    """The model after two training steps, and where the host has waited in the second."""
    cfg = composed(*MODELS[name].split())
    data = surrogate(cfg.data, rows=16)
    model = instantiate(cfg.model, **data.model_arguments()).to(DEVICE).train()
    hb.set_method(model, method)
    batches, optimizer = data.train_batches(2, 0, DEVICE), build_optimizer(model, cfg.optim)
    passes = partial(one_pass, model, data.task.loss, amp=amp)
    for step in range(2):
        gpu.waits.clear()
        measured = training_step(model, passes, optimizer, batches.batch(step), clip=1.0)
    assert measured.is_cuda and measured.dtype == torch.float32
    trained = [p for p in model.parameters() if p.grad is not None]
    assert trained and all(p.grad.is_cuda and p.grad.dtype == p.dtype for p in trained)
    return model, gpu.waits


def test_what_is_noticed(gpu):
    x = torch.ones(3, device=DEVICE)
    torch.ones(3).to(DEVICE, non_blocking=True)
    assert not gpu.waits
    x.sum().item()
    x.cpu()
    torch.ones(3).to(DEVICE)
    x[torch.tensor([0])]
    assert [wait.removeprefix("elsewhere ") for wait in gpu.waits] == [
        "reads a number",
        "copies to the CPU",
        "copies to the device",
        "brings an index to the device",
    ]
    with pytest.raises(RuntimeError, match="devices"):
        x + torch.ones(3)
    with pytest.raises(DynamicOutputShapeException):
        x[x > 0]
    with pytest.raises(AssertionError):  # a state that is not contiguous
        nn.GRU(3, 3, device=DEVICE)(
            torch.ones(2, 2, 3, device=DEVICE), torch.ones(1, 3, 2, device=DEVICE).mT
        )


@pytest.mark.parametrize("name", MODELS)
def test_models_in_bfloat16(gpu, name):
    _, waits = second_step(gpu, name, hb.Highway(1), amp=True)
    # Where products of carries may overflow, the host looks once how they are to be scanned.
    assert waits == ["DiagonalScan.__init__ reads a number"] * ("diagonal" in name)


IN_FLOAT32 = [
    *(("gpt2", method) for method in METHODS),
    *(("lstm_char", m) for m in METHODS if getattr(m, "gamma", 0.0) != "auto"),  # refused there
    ("gru_char", hb.Highway(1, group_size=4)),
]


@pytest.mark.parametrize(("name", "method"), IN_FLOAT32, ids=str)
def test_methods_in_float32(gpu, name, method):
    model, waits = second_step(gpu, name, method, amp=False)
    asked = getattr(method, "tolerance", None) is not None  # after every iteration
    assert len(waits) == (hb.iterations(model) if asked else 0), waits


@pytest.mark.parametrize("cell", [hb.GRU, hb.LSTM])
@pytest.mark.parametrize("cudnn", [91900, 90000])  # the newer one has bfloat16
def test_lengths_and_directions(cell, cudnn):
    with FakeGPU(cudnn) as gpu, torch.autocast("cuda", dtype=torch.bfloat16):
        rnn = cell(3, 4, num_layers=2, bidirectional=True, method=hb.Highway(1)).to(DEVICE)
        x = torch.randn(6, 3, 3, device=DEVICE, requires_grad=True)
        gpu.waits.clear()
        y, _ = rnn(x, lengths=torch.tensor([4, 6, 1]))
        y.sum().backward()
    assert y.dtype == (torch.bfloat16 if cudnn > 91300 else torch.float32)
    assert x.grad.is_cuda
    assert gpu.waits == ["MethodRNN._padded copies to the device"]  # torch's own: rows' order


class Folder:
    """What a trainer asks of a run's folder."""

    def __init__(self):
        self.path, self.writes, self.records, self.saved = Path("run"), False, [], 0

    def append(self, record):
        self.records.append(record)

    def save(self, state):
        self.saved += 1


def trainer_of(line: str) -> Trainer:
    """Of arguments of train.py, on made-up data that are augmented where they are images."""
    plan = planned(*line.split())
    cfg, data = plan.cfg, surrogate(plan.cfg.data, rows=64)
    if isinstance(data, ImageData):
        data = replace(data, augment=True, flip=True)
    model = instantiate(cfg.model, **data.model_arguments())
    hb.set_method(model, plan.method)
    objective = Objective(cfg, data, plan.device, plan.processes)
    return Trainer(plan, objective, model, Folder(), lambda *_: None, {})


SCHEDULES = sorted(file.stem for file in (CONFIGS / "schedule").glob("*.yaml"))
LINES = [
    *(f"model=gru_char model.hidden=8 data.length=12 schedule={name}" for name in SCHEDULES),
    "model=resnet20_preact model.depth=8",
    "experiment=grammar data.length=16 model.layers=2",
]


@pytest.mark.parametrize("line", LINES)
def test_the_trainer_reads_once_per_record(gpu, line):
    given = "device=cuda grad=highway k=1 steps=6 optim.batch_size=4 trainer.log_interval=3"
    # weights are laid out once: fake ones cannot be swapped twice
    trainer = trainer_of(f"{line} {given} trainer.channels_last=false trainer.eval_interval=6")
    trainer._step()  # the first pass checks more
    measured = [place for place in gpu.waits if "sums_of" in place]  # of the gradient's error
    assert bool(measured) == ("adaptive" in line)
    gpu.waits.clear()
    trainer.train()
    assert [r["step"] for r in trainer.folder.records] == [3, 6, 6]
    assert trainer.folder.saved == 1
    waits = Counter(gpu.waits)
    assert waits.pop("Trainer._read reads a number") == 2
    assert waits.pop("_mean_per_target reads a number") == 1
    # The rows of an evaluation, if they do not lie on the device already
    assert all("rows copies to the device" in place for place in waits), waits
