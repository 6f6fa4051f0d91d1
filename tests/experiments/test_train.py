"""train.py on a tiny network: runs, what they leave behind, and that stopping costs nothing."""

import os
import random
import re
import signal

import pytest
import torch

from experiments import checkpoint
from experiments.row import check_row
from tests.train_cli import (
    TINY_GPT,
    assert_same,
    count_lines,
    numbers,
    only_run,
    records_of,
    row_of,
    signal_after,
    start_and_kill,
)

pytestmark = pytest.mark.slow


NONE = dict.fromkeys(["k", "gamma", "group_size", "window", "mgrit", "schedule"])
DIGITS = NONE | dict(experiment="digits_tiny", model="resnet20_preact", data="digits", L=3)
DIGITS |= dict(metric="eval_accuracy")
TEXT = NONE | dict(experiment="topics_tiny", data="topics", metric="eval_bits_per_char")
CHARS = "model=lstm_char data=topics_chars data.length=16 model.hidden=8 model.carry=literal"
WORDS = "model=gru_words data=topics_words data.length=16 model.hidden=8 data.vocabulary=300"
K_1 = dict(k=1, gamma=0.0, group_size=1, block_passes=6)
WHOLE = {  # a part of the row, by command line
    "grad=bp": DIGITS,
    "grad=fixed_point k=1": DIGITS | dict(k=1, group_size=1),
    "grad=highway k=0": DIGITS | dict(k=0, gamma=0.0, group_size=1, block_passes=0),
    "grad=highway k=2 grad.gamma=0.5": DIGITS | K_1 | dict(k=2, gamma=0.5, block_passes=12),
    "grad=mgrit grad.coarsening=2": DIGITS
    | dict(mgrit="cycles=1 coarsening=2 levels=2 relaxation=FCF"),
    "grad=bp experiment=topics_tiny": TEXT,
    "grad=truncated_bptt experiment=topics_tiny grad.window=4": TEXT | dict(window=4),
    "grad=fixed_point experiment=topics_tiny k=1": TEXT | dict(k=1, group_size=1),
    "grad=highway experiment=topics_tiny k=1 grad.group_size=4": TEXT | K_1 | dict(group_size=4),
    f"grad=highway experiment=topics_tiny k=1 {CHARS}": TEXT | K_1,
    f"grad=highway experiment=topics_tiny k=1 {WORDS}": TEXT | K_1 | dict(metric="eval_perplexity"),
}
ADAPTIVE = (
    "experiment=topics_tiny steps=8 schedule=adaptive schedule.budget=0.9 schedule.ks=[0,1,2] "
    "schedule.tolerance=0.4 diagnostics=figure6 diagnostics.at=[0,0.5]"
)


@pytest.mark.parametrize("line", WHOLE)
def test_a_whole_run(train, runs, line):
    assert train(*line.split()).code == 0
    row, records = row_of(only_run(runs)), records_of(only_run(runs))
    grad = line.split()[0].removeprefix("grad=")
    assert (WHOLE[line] | dict(grad=grad, steps=6, seed=0)).items() <= row.items()
    check_row(row, "row.json")
    trained, scored = ([r for r in records if key in r] for key in ("train_loss", "eval_loss"))
    assert [(r["step"], r["k"]) for r in trained] == [(step, row["k"]) for step in range(1, 7)]
    assert [r["step"] for r in scored] == [3, 6]
    assert row[row["metric"]] == scored[-1][row["metric"]]
    if row["data"] == "topics":
        assert scored[-1]["eval_perplexity"] > 20
        assert row["parameters"] > 1000 and all("train_accuracy" not in r for r in records)


def test_large_k_trains_as_backprop_but_k_0_and_bfloat16_do_not(train, tmp_path):
    def trained(arm: str, bfloat16: str = "false") -> list[dict]:
        root = tmp_path / f"{arm}-{bfloat16}".replace("=", "-")
        train(arm, f"trainer.amp={bfloat16}", f"run_root={root}")
        return records_of(only_run(root))

    exact, same, at_k_0 = trained("grad=bp"), trained("k=3"), trained("k=0")
    bfloat16 = trained("grad=bp", "true")
    for a, b in zip(exact, same, strict=True):
        for key in a.keys() & {"train_loss", "eval_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3)
    assert at_k_0[0]["grad_norm"] != pytest.approx(exact[0]["grad_norm"], rel=1e-2)
    assert bfloat16[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.05)
    assert bfloat16[0]["train_loss"] != exact[0]["train_loss"]


@pytest.mark.parametrize(
    "change", ["trainer.log_interval=2", "logger=wandb_offline", "trainer.progress=true", "seed=0"]
)
def test_a_finished_run_is_skipped_if_nothing_changes_its_result(train, runs, change):
    train("steps=1")
    before = {file: file.stat().st_mtime_ns for file in only_run(runs).iterdir()}
    again = train("steps=1", change)
    assert (again.code, "finished already, skipped" in again.out) == (0, True)
    assert before == {file: file.stat().st_mtime_ns for file in only_run(runs).iterdir()}


def test_a_row_that_was_lost_is_written_again(train, runs):
    train("steps=1")
    row = row_of(only_run(runs))
    (only_run(runs) / "row.json").write_text("{")
    assert train("steps=1").code == 0
    assert numbers(row_of(only_run(runs))) == numbers(row)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schedule": ...}, "another model or optimiser, or version: 'schedule'"),
        ({"optimizer": {}}, "version: 'param_groups'"),
        ({"model": {}}, "version: Error(s) in loading state_dict for ResNet: Missing key(s)"),
    ],
)
def test_a_checkpoint_of_another_version_is_one_line_and_no_result(train, runs, change, line):
    train("steps=1")
    for name in ("DONE", "row.json"):
        (only_run(runs) / name).unlink()
    file = only_run(runs) / checkpoint.LATEST
    state = torch.load(file, weights_only=True) | change
    torch.save({key: value for key, value in state.items() if value is not ...}, file)
    seen = train("steps=1")
    assert seen.code == 1 and line in seen.err and seen.err.count("\n") == 1
    assert not (only_run(runs) / "DONE").exists()


def test_a_sweep_keeps_its_files_in_run_root(train, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = train("--multirun", "grad=highway", "k=0,1", "steps=1").out
    assert "run 1 of 2: " in out
    assert "run 2 of 2: grad=highway k=1 steps=1 " in out
    beginning = "resnet20_preact on digits, highway k=0, 1 steps in batches of 16, seed 0, on "
    assert re.search(rf"/resnet20_preact-highway-k0-\S+: {beginning}\w+\n", out)
    assert [path.name for path in tmp_path.iterdir()] == [runs.name]
    assert (runs / "multirun.yaml").exists()


@pytest.mark.parametrize(
    ("sent", "step", "line"),
    [
        (signal.SIGTERM, 5, "k=1"),
        (signal.SIGINT, 5, "k=1"),
        (signal.SIGTERM, 5, "experiment=topics_tiny k=1"),
        (signal.SIGTERM, 5, "k=1 trainer.amp=true"),  # bfloat16, on a CPU as well
        (signal.SIGTERM, 2, ADAPTIVE),
        (signal.SIGTERM, 5, ADAPTIVE),
        (signal.SIGTERM, 3, " ".join([*TINY_GPT, "k=1 gamma=auto trainer.eval_interval=6"])),
    ],
)
def test_a_signal_ends_the_step_and_the_run_goes_on_exactly(
    train, runs, tmp_path, sent, step, line
):
    asked = ("grad=highway", *line.split())
    with signal_after(step, sent):
        stopped = train(*asked)
    assert stopped.code == 128 + sent
    assert "goes on from here" in stopped.err
    assert torch.load(only_run(runs) / checkpoint.LATEST, weights_only=True)["step"] == step
    resumed = train(*asked)
    assert (resumed.code, f"going on after step {step}" in resumed.out) == (0, True)
    train(*asked, f"run_root={tmp_path / 'whole'}")
    assert_same(only_run(runs), only_run(tmp_path / "whole"))
    bfloat16 = "trainer.amp=true" in line
    assert row_of(only_run(runs))["precision"] == ("bfloat16" if bfloat16 else "float32")
    saved = only_run(runs) / "pretrained" / "model.safetensors"
    assert saved.exists() == ("model=gpt2" in line)


def test_a_signal_in_the_final_evaluation_ends_a_sweep(train, runs, monkeypatch):
    from experiments.objective import Objective

    evaluate = Objective.evaluate

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", interrupted)
        assert train("-m", "k=0,1", "steps=1").code == 128 + signal.SIGTERM
    assert train("k=0", "steps=1").code == 0 and row_of(only_run(runs))["eval_accuracy"] > 0


def test_an_evaluation_that_fails_loses_no_step(train, runs, tmp_path, monkeypatch):
    from experiments.objective import Objective

    def failing(self, *arguments):
        raise MemoryError

    given = ["grad=bp", "steps=4", "trainer.eval_interval=2", "diagnostics=figure6"]
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", failing)
        assert train(*given).code == 1
    seen = train(*given)
    assert seen.code == 0 and "going on after step 2" in seen.out
    assert train(*given, f"run_root={tmp_path / 'whole'}").code == 0
    assert_same(only_run(runs), only_run(tmp_path / "whole"))


def test_nonfinite_gradients_name_the_parameter(train, runs, monkeypatch):
    from models.resnet import ResNet

    build = ResNet.__init__

    def poisoned(self, *args, **kwargs):
        build(self, *args, **kwargs)
        weight = self.chain[1].block.body[2].weight
        weight.register_hook(lambda g: g * float("inf"))

    monkeypatch.setattr(ResNet, "__init__", poisoned)
    seen = train("grad=bp")
    assert seen.code == 1
    assert "step 1: the gradient is not finite, first in chain.1.block.body.2.weight" in seen.err
    state = torch.load(only_run(runs) / "nonfinite.pt", weights_only=True)
    assert state["step"] == 0


@pytest.mark.parametrize(("rate", "last"), [("1e30", 1), ("0.05", 6)])
def test_a_run_that_diverges_ends_as_a_row(train, runs, rate, last):
    seen = train("grad=bp", f"optim.lr={rate}")
    row = row_of(only_run(runs))
    check_row(row, "row.json")
    assert row["diverged"] == (rate == "1e30") and row["last_finite_step"] == last
    if row["diverged"]:
        assert seen.code == 1 and "row.json says so" in seen.err
        assert row["eval_accuracy"] is None and row["seconds"] > 0
        again = train("grad=bp", f"optim.lr={rate}").out
        assert again.endswith(": finished already, skipped; it diverged\n")


def test_kill_minus_nine_at_five_moments(train, tmp_path):
    """The same command until it ends; afterwards nothing tells the run from a whole one."""
    arguments = ["experiment=digits_tiny", "steps=60", "grad=highway", "k=1"]
    arguments += ["logger=none", "trainer.threads=1"]
    random_ = random.Random(0)
    root = tmp_path / "killed"
    for _ in range(5):  # counted in records, as the start-up lasts as long as it lasts
        lines = count_lines(root) + random_.randrange(1, 6)
        start_and_kill(root, lines, *arguments, pause=random_.random() * 0.05)
    for last in (root, tmp_path / "whole"):
        assert train(*arguments, f"run_root={last}").code == 0
    assert_same(only_run(root), only_run(tmp_path / "whole"))
