"""Every kind of model trained by every kind of method: three steps on the GPU and on the CPU.

Both begin with the same weights and batches, the CPU in float32; loss and gradient norm of every
step agree as far as float32 or bfloat16 allow. Without a GPU the CPU is compared with itself, for
one model: that tries the test alone.
"""

import copy
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

import highway_bp as hb
from experiments.config import composed
from experiments.cuda_graphs import EAGER, GraphedPasses, Passed
from experiments.devices import prepare_torch
from experiments.errors import UserError
from scripts.benchmark import DEVICE
from scripts.surrogate import one_pass, surrogate, training_step
from tests.train_cli import assert_same, only_run

pytestmark = pytest.mark.slow

STEPS, BATCH = 3, 8
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}
CHARS = "model.hidden=64 data.length=48"
SMALL = "model.depth=8"
MODELS = {  # in small, as arguments of train.py
    "gru_char": f"model=gru_char {CHARS}",
    "gru_char diagonal": f"model=gru_char {CHARS} model.carry=diagonal",
    "lstm_char": f"model=lstm_char {CHARS}",
    "lstm_char literal": f"model=lstm_char {CHARS} model.carry=literal",
    "gru_words": f"model=gru_words {CHARS} data.vocabulary=512",
    "gru_pixels": "model=gru_pixels model.hidden=32",
    "resnet20_preact": f"model=resnet20_preact {SMALL}",
    "resnet20": f"model=resnet20 {SMALL}",
    "resnet20 strided": f"model=resnet20 {SMALL} model.downsampling=strided",
    "resnet20 irevnet": f"model=resnet20_preact {SMALL} model.downsampling=irevnet",
    "torchvision resnet18": "model=resnet50 model.name=resnet18 data=cifar10",
    "vit": "model=vit model.layers=3",
    "gpt2": "model=gpt2_small model.layers=3 data.length=32",
    "llama": "model=llama model.layers=3 data.length=32 data.vocabulary=512",
    "roberta": "experiment=grammar data.length=16",
}
METHODS = [
    *(hb.Backprop(), hb.Highway(0), hb.Highway(3), hb.Highway(2, 0.2), hb.Highway(1, group_size=4)),
    *(hb.FixedPoint(2), hb.TruncatedBPTT(4), hb.MGRIT(1, 3), hb.Highway(2, "auto")),
    hb.Highway(9, tolerance=0.3),
]


def steps(model: nn.Module, data, method: hb.Method, device: torch.device, amp: bool) -> Tensor:
    """Loss and gradient norm of each step (STEPS, 2), float64 on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    hb.set_method(model, method)
    batches = data.train_batches(BATCH, 0, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # steps multiply rounding errors
    passes = partial(one_pass, model, data.task.loss, amp=amp)
    found = [
        training_step(model, passes, optimizer, batches.batch(step), clip=1.0)
        for step in range(STEPS)
    ]
    return torch.stack(found).double().cpu()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", MODELS if DEVICE.type == "cuda" else ["gru_char"])
def test_steps_are_those_of_the_cpu(name, method):
    cfg = composed(*MODELS[name].split())
    prepare_torch(cfg.trainer)
    data = surrogate(cfg.data, rows=64)
    torch.manual_seed(0)
    model = instantiate(cfg.model, **data.model_arguments())
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # devices draw other random numbers
            module.p = 0.0
    recurrent = any(isinstance(module, hb.GRU | hb.LSTM) for module in model.modules())
    if recurrent and getattr(method, "gamma", 0.0) == "auto":
        with pytest.raises(ValueError, match="gamma='auto' in a recurrent layer"):
            steps(model, data, method, DEVICE, amp=False)
        return
    exact = steps(model, data, method, torch.device("cpu"), amp=False)
    measured = getattr(method, "gamma", 0.0) == "auto"  # by probes, of which devices draw others
    for precision, allowed in ALLOWED.items():
        allowed = max(allowed, 0.03) if measured else allowed
        found = steps(model, data, method, DEVICE, amp=precision == "bfloat16")
        assert ((found - exact).abs() / exact.abs()).max() < allowed, precision


GRAPHED = [  # passes of other kinds between the replays, and methods in turn
    "grad=bp",
    "k=1 diagnostics=figure6 trainer.amp=true",
    "schedule=milestones schedule.ks=[0,2] schedule.at=[0.5]",
    "schedule=adaptive",
    "experiment=topics_tiny grad=fixed_point k=1",
    "experiment=topics_tiny model=lstm_char k=2",
]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize("line", GRAPHED)
def test_cuda_graphs_train_to_the_same_bits(train, runs, line):
    for graph in ("true", "false"):
        given = [*line.split(), "steps=24", "trainer.deterministic=true", "device=cuda"]
        done = train(*given, f"trainer.cuda_graph={graph}", f"run_root={runs / graph}")
        assert done.code == 0, done.err
    assert_same(*(only_run(runs / graph) for graph in ("true", "false")))


class Reads(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize("part", [nn.Dropout(0.5), Reads()], ids=["dropout", "reads"])
def test_what_a_cuda_graph_cannot_repeat_is_refused(part):
    model = nn.Sequential(nn.Linear(8, 8), part).to(DEVICE)
    x = torch.randn(4, 8, device=DEVICE)

    def run(x, y):
        loss = (model(x) - y).square().sum()
        loss.backward()
        return Passed({"loss": loss.detach()}, 0)

    passes = GraphedPasses(model, run)
    with pytest.raises(UserError, match=r"trainer.cuda_graph: .*; expected false"):
        for _ in range(EAGER):
            model.zero_grad()
            passes(hb.Backprop(), x, x)
