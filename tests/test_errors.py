"""tests/errors.md has every line that wrong input gives; here each is provoked.

A first column in backticks is what stands behind ``python train.py``; any other first column is a
situation made by the function of that name below. ``…`` stands for whatever differs by machine.
"""

import re
import resource
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra.core.plugins import Plugins
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.data.pairs import LABELS
from experiments.errors import UserError
from experiments.run_folder import LOCK
from models.cells import MinimalGatedCell
from models.pair_classifier import PairClassifier
from scripts import run_plan
from tests.highway_bp.families import build
from tests.train_cli import only_run

pytestmark = pytest.mark.slow

PAGE = Path(__file__).with_name("errors.md")
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| situation")
]
SITUATIONS = {}


def situation(function):
    SITUATIONS[function.__name__.replace("_", " ")] = function
    return function


def matches(documented: str, seen: str) -> bool:
    parts = [re.escape(part) for part in documented.strip("`").split("…")]
    return re.fullmatch(".*?".join(parts), seen, re.DOTALL) is not None


@pytest.mark.parametrize(("what", "line"), [r for r in ROWS if r[0].startswith("`")])
def test_command_line(train, runs, what, line):
    seen = train(*what.strip("`").split())
    assert seen.code == 1
    assert matches(line, seen.err.strip()), seen.err
    assert "\n" not in seen.err.strip()


@pytest.mark.parametrize(("what", "line"), [r for r in ROWS if not r[0].startswith("`")])
def test_situation(train, runs, tmp_path, monkeypatch, what, line):
    seen = SITUATIONS[what](train, runs, tmp_path)
    assert matches(line, seen.strip()), seen


def test_every_situation_is_documented():
    assert set(SITUATIONS) == {what for what, _ in ROWS if not what.startswith("`")}


def raised(error: type[Exception], call) -> str:
    with pytest.raises(error) as told:
        call()
    return str(told.value)


class Add(nn.Module):
    """h + h, with the carry it is given."""

    def __init__(self, carry):
        super().__init__()
        self.value = carry

    def forward(self, h):
        return h + h

    def carry(self, h_in, h_out):
        return self.value


class Narrow(nn.Module):
    def forward(self, h):
        return h[..., :2]


class Pair(nn.Module):
    def forward(self, h):
        return h, None


def backward(*layers: nn.Module, k: int = 1):
    x = torch.randn(2, 4, requires_grad=True)
    hb.ResidualChain(layers, hb.Highway(k))(x).sum().backward()


X = torch.randn(5, 2, 3)  # L, B, I


RAISED = {  # in the library, by one expression
    "a carry of the wrong shape": (ValueError, lambda: backward(Add(torch.ones(3)), Add(None))),
    "a carry of the wrong dtype": (
        TypeError,
        lambda: backward(Add(torch.ones(4, dtype=torch.int64)), Add(None)),
    ),
    "a carry of another type": (TypeError, lambda: backward(Add("ones"), Add(None))),
    "a layer that changes the shape with an identity carry": (
        ValueError,
        lambda: backward(Narrow(), Add(None)),
    ),
    "a layer that returns a tuple": (TypeError, lambda: backward(Pair(), Add(None))),
    "a recurrent layer with what is no method": (TypeError, lambda: hb.GRU(3, 4, method="bp")),
    "a recurrent layer with an unknown carry": (ValueError, lambda: hb.LSTM(3, 4, carry="forget")),
    "an LSTM with a projection": (
        ValueError,
        lambda: hb.LSTM(3, 4, proj_size=2, method=hb.Highway(1)),
    ),
    "a length of zero": (ValueError, lambda: hb.GRU(3, 4)(X, lengths=[5, 0])),
    "a length beyond the input": (ValueError, lambda: hb.GRU(3, 4)(X, lengths=[6, 1])),
    "too few lengths": (ValueError, lambda: hb.GRU(3, 4)(X, lengths=[5])),
    "a cell without a carry": (TypeError, lambda: hb.Recurrent(nn.Linear(3, 4))),
    "a scan of whole numbers": (TypeError, lambda: hb.cumsumprod(torch.arange(3))),
    "a scan with one carry": (TypeError, lambda: hb.cumsumprod(X, hb.Scalar(0.5))),
    "a scan of one number": (ValueError, lambda: hb.cumsumprod(torch.tensor(1.0))),
    "a schedule of no method": (TypeError, lambda: hb.schedules.Constant(3)),
    "milestones of no k": (
        ValueError,
        lambda: hb.schedules.Milestones(hb.Highway(1), ks=[], at=[]),
    ),
    "a method state that is none": (
        TypeError,
        lambda: hb.load_method_state(hb.convert(a_llama(), hb.Highway(1)), {"a": 1}),
    ),
    "a trunk by its layers": (
        TypeError,
        lambda: hb.convert(a_llama(), hb.Highway(1), layers=nn.Linear),
    ),
    "a model without a chain": (ValueError, lambda: hb.set_method(nn.Linear(3, 4), hb.Highway(1))),
    "a layer that changes its input in place": (RuntimeError, lambda: backward(InPlace())),
    "a model whose trunk is not known": (
        ValueError,
        lambda: hb.convert(nn.Linear(3, 3), hb.Highway(1)),
    ),
    "a trunk by a name that is not there": (
        ValueError,
        lambda: hb.convert(a_llama(), hb.Highway(1), layers="layers"),
    ),
    "a compiled model": (ValueError, lambda: hb.convert(torch.compile(a_llama()), hb.Highway(1))),
    "a model wrapped for several devices": (
        ValueError,
        lambda: hb.convert(nn.DataParallel(a_llama()), hb.Highway(1)),
    ),
    "advice on a loss that is no scalar": (
        ValueError,
        lambda: hb.advise(hb.GRU(3, 4), X, lambda m, x: m(x)[0]),
    ),
    "an error of a loss that is a models output": (
        TypeError,
        lambda: hb.gradient_error(hb.GRU(3, 4), lambda m: m(X)),
    ),
    "a gamma that is an unknown word": (TypeError, lambda: hb.Highway(1, gamma="best")),
    "gamma auto in a recurrent layer": (
        ValueError,
        lambda: hb.GRU(3, 4, method=hb.Highway(1, gamma="auto")),
    ),
    "a plan of an unknown experiment": (UserError, lambda: run_plan.main(["resnet23"])),
}


SITUATIONS.update({what: lambda *_, it=it: raised(*it) for what, it in RAISED.items()})


@situation
def lengths_and_windows_in_an_LSTM(*_):
    lstm = hb.LSTM(3, 4, method=hb.Highway(1, group_size=2))
    return raised(ValueError, lambda: lstm(X, lengths=[5, 1]))


@situation
def a_cell_whose_carry_has_the_wrong_shape(*_):
    cell = MinimalGatedCell(3, 4)
    network = hb.Recurrent(cell, lambda x, before, after: torch.ones(5), hb.Highway(1))
    return raised(ValueError, lambda: network(X)[0].sum().backward())


class Around(MinimalGatedCell):
    def __init__(self, after: nn.Module):
        super().__init__(3, 4)
        self.after = after

    def forward(self, x, h):
        return self.after(super().forward(x, h))


def of_cell(after: nn.Module) -> str:
    network = hb.Recurrent(Around(after), method=hb.Highway(1))
    return raised(RuntimeError, lambda: network(X)[0].sum().backward())


@situation
def a_cell_with_dropout(*_):
    return of_cell(nn.Dropout(0.5))


@situation
def a_cell_with_batch_normalisation(*_):
    return of_cell(nn.BatchNorm1d(4))


@situation
def a_recurrent_layer_in_a_transform(*_):
    rnn = hb.GRU(3, 4, method=hb.Highway(1))
    return raised(RuntimeError, lambda: torch.func.grad(lambda x: rnn(x)[0].sum())(X))


@situation
def batched_gradients(*_):
    rnn, two = hb.GRU(3, 4, method=hb.Highway(1)), torch.ones(2, 5, 2, 4)
    output, leaves = rnn(X)[0], list(rnn.parameters())
    return raised(
        RuntimeError, lambda: torch.autograd.grad(output, leaves, two, is_grads_batched=True)
    )


class InPlace(nn.Module):
    def forward(self, h):
        return h.add_(1.0)


def a_llama() -> nn.Module:
    return build("llama")


@situation
def a_module_backward_hook_on_a_layer(*_):
    model = hb.convert(a_llama(), hb.Highway(1))
    model.model.layers[0].register_full_backward_hook(lambda *_: None)
    return raised(RuntimeError, lambda: model(input_ids=torch.ones(1, 3, dtype=torch.int64)))


@situation
def reentrant_checkpointing(*_):
    model = hb.convert(a_llama(), hb.Highway(1)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return raised(ValueError, lambda: model(input_ids=torch.ones(1, 3, dtype=torch.int64)))


class Captures(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weights = [weight]

    def forward(self, h):
        return h + h * self.weights[0]


@situation
def a_layer_that_uses_what_is_no_parameter_of_the_chain(*_):
    weight = torch.ones(3, requires_grad=True)
    chain = hb.ResidualChain([Captures(weight)], hb.Highway(1))
    return raised(RuntimeError, lambda: chain(torch.ones(2, 3, requires_grad=True)))


@situation
def a_model_converted_twice(*_):
    model = hb.convert(a_llama(), hb.Highway(1))
    return raised(ValueError, lambda: hb.convert(model, hb.Highway(2)))


@situation
def the_estimated_error_of_a_method_without_iterations(*_):
    rnn = hb.GRU(3, 4)
    return raised(
        ValueError, lambda: hb.estimated_error(rnn, lambda m: m(X)[0].sum(), method=hb.Backprop())
    )


@situation
def advice_without_a_k_to_try(*_):
    rnn = hb.GRU(3, 4)
    return raised(ValueError, lambda: hb.advise(rnn, X, lambda m, x: m(x)[0].sum(), ks=()))


@situation
def a_second_derivative_through_a_chain(*_):
    rnn, x = hb.GRU(3, 4, method=hb.Highway(1)), X.clone().requires_grad_()
    loss = rnn(x)[0].sum()
    return raised(RuntimeError, lambda: torch.autograd.grad(loss, x, create_graph=True))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, h):
        return h * self.blocks[0][0].bias


@situation
def a_model_that_never_runs_the_layers_it_was_converted_by(*_):
    model = hb.convert(Unused(), hb.Highway(1), layers="blocks")
    return raised(ValueError, lambda: hb.gradient_error(model, lambda m: m(X).sum()))


@situation
def a_chain_of_layers_without_residual_connections(*_):
    torch.manual_seed(0)
    chain = hb.ResidualChain([nn.Linear(64, 64) for _ in range(4)], hb.Highway(1))
    with pytest.warns(UserWarning) as told:
        chain(torch.randn(8, 64)).sum().backward()
        chain(torch.randn(8, 64)).sum().backward()
    assert len(told) == 1
    return str(told[0].message)


@situation
def the_gradient_error_of_a_method_without_iterations(*_):
    model = hb.ResidualChain([Add(None)])
    return raised(ValueError, lambda: hb.gradient_error(model, sum, method=hb.Backprop()))


@situation
def a_tokenizer_that_does_not_match_the_model(train, runs, tmp_path):
    folder = str(tmp_path / "m")
    PairClassifier(
        vocabulary=9, padding=0, labels=LABELS, layers=1, hidden=8, heads=2, length=32
    ).save_pretrained(folder)
    return train("experiment=grammar", f"model.pretrained={folder}").err


@situation
def label_names_in_another_order(train, runs, tmp_path):
    folder = str(tmp_path / "m")
    PairClassifier(
        vocabulary=99, padding=0, labels=LABELS[::-1], layers=1, hidden=8, heads=2, length=32
    ).save_pretrained(folder)
    return train("experiment=grammar", f"model.pretrained={folder}").err


@situation
def a_tokenizer_that_cannot_be_had(train, runs, tmp_path):
    return train("experiment=minilm_nli_mix", "data.tokenizer=package:nowhere/model").err


@situation
def image_folders_without_a_place(train, *_):
    return train("experiment=resnet50_image_folder").err


@situation
def a_k_that_has_no_effect(train, *_):
    return train("grad=bp", "k=5", "steps=1").out.splitlines()[0]


@situation
def a_gamma_that_has_no_effect(train, *_):
    return train("grad=fixed_point", "gamma=0.2", "steps=1").out.splitlines()[0]


@situation
def a_k_that_the_schedule_sets(train, *_):
    return train("schedule=milestones", "k=5").out.splitlines()[0]


@situation
def a_k_larger_than_L_in_training(train, *_):
    return train("k=5", "steps=1").out.splitlines()[1]


@situation
def a_data_file_cut_off(train, runs, tmp_path):
    folder = tmp_path / "data" / "uoft-cs" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(f"PAR1 and no {split}".encode())
    return train("data=cifar10", f"data.root={tmp_path / 'data'}").err


@situation
def a_data_file_missing(train, runs, tmp_path):
    (tmp_path / "data" / "uoft-cs" / "cifar10" / "plain_text").mkdir(parents=True)
    return train("data=cifar10", f"data.root={tmp_path / 'data'}").err


@situation
def a_run_folder_that_cannot_be_written(train, *_):
    return train("run_root=/dev/null/runs").err


@situation
def a_damaged_checkpoint(train, runs, tmp_path):
    stop_after(train, 5)
    damage(only_run(runs) / checkpoint.LATEST)
    resumed = train("steps=6")
    assert resumed.code == 0
    return resumed.out.splitlines()[1]


@situation
def all_checkpoints_damaged(train, runs, tmp_path):
    stop_after(train, 5)
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        damage(only_run(runs) / name)
    return train("steps=6").err


@situation
def a_checkpoint_of_another_configuration(train, runs, tmp_path):
    train("steps=1")
    folder = only_run(runs)
    (folder / "DONE").unlink()
    state = torch.load(folder / checkpoint.LATEST, weights_only=True)
    torch.save({**state, "config_hash": "00000000"}, folder / checkpoint.LATEST)
    return train("steps=1").err


@situation
def a_run_folder_of_another_configuration(train, runs, tmp_path):
    train("steps=1")
    file = only_run(runs) / "config.json"
    file.write_text(file.read_text().replace('lr": 0.05', 'lr": 0.5'))
    return train("steps=1").err


@situation
def a_file_that_cannot_grow(train, runs, tmp_path):
    """As on a full disk: the kernel refuses to write beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        seen = train("steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen.code == 1
    assert train("steps=2").code == 0  # with room again, the same command ends well
    return seen.err


@situation
def a_failing_run_in_a_sweep(train, runs, _):
    seen = train("--multirun", "model.depth=9,8", "steps=1")
    assert (only_run(runs) / "DONE").exists()  # the other one goes on
    return in_one_line(seen.err)


@situation
def an_unknown_value_in_a_sweep(train, *_):
    return in_one_line(train("--multirun", "grad=higway,bp", "seed=0,1", "steps=1").err)


def in_one_line(said: str) -> str:
    return said.strip().replace("\n", "⏎")


@situation
def a_run_that_another_process_trains(train, runs, tmp_path):
    train("steps=1")
    (only_run(runs) / "DONE").unlink()
    with FileLock(only_run(runs) / LOCK):
        return train("steps=1").out


@situation
def a_launcher_that_is_not_installed(train, *_):
    with pytest.MonkeyPatch.context() as patch:
        plugin = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
        patch.delitem(Plugins.instance().class_name_to_class, plugin, raising=False)
        return train("--multirun", "k=0,1", "hydra/launcher=local").err


def stop_after(train, steps: int) -> None:
    """A run whose process ended without a word after ``steps`` steps."""
    from experiments.trainer import Trainer

    whole = Trainer._step

    def dying(self):
        if self.step == steps:
            raise SystemExit(99)
        return whole(self)

    Trainer._step = dying
    try:
        assert train("steps=6").code == 99
    finally:
        Trainer._step = whole


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
