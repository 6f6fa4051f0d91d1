"""continue_from: a run that begins where another one has stopped."""

import pytest
import torch

from experiments import checkpoint
from experiments.row import check_row
from tests.train_cli import numbers, only_run, records_of, row_of

pytestmark = pytest.mark.slow


def trained(record: dict) -> dict:
    """What the weights decide; passes are those of the method."""
    keys = record.keys() & {"step", "train_loss", "grad_norm", "lr"}
    return {key: numbers(record)[key] for key in keys}


def test_it_goes_on_as_the_other_would_have(train, tmp_path):
    one, two, whole = (tmp_path / name for name in ("one", "two", "whole"))
    assert train("grad=bp", f"run_root={whole}").code == 0
    assert train("grad=bp", "steps=3", f"run_root={one}", "optim.drops=[]").code == 0
    told = train("grad=bp", f"continue_from={only_run(one)}", f"run_root={two}")
    assert told.code == 0 and "going on after step 3" in told.out
    row = row_of(only_run(two))
    check_row(row, "row.json")
    assert row["continued_from"] == f"{row_of(only_run(one))['config_hash']} at step 3"
    begins, *others = records_of(only_run(two))
    assert begins["step"] == 3 and "eval_loss" in begins  # where the other one ended
    later = [r for r in records_of(only_run(whole)) if r["step"] > 3]
    assert [*map(trained, others)] == [*map(trained, later)]
    ends = [torch.load(only_run(run) / checkpoint.LATEST)["model"] for run in (two, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))
    assert row["config_hash"] != row_of(only_run(whole))["config_hash"]


def test_another_method_and_a_schedule_may_take_over(train, tmp_path):
    first = ["grad=highway", "k=1", "gamma=auto", "steps=2"]
    assert train(*first, f"run_root={tmp_path / 'a'}").code == 0
    then = ("schedule=adaptive", f"run_root={tmp_path / 'b'}")
    for ends in ("going on after step 2", "finished already"):
        told = train("grad=highway", "k=1", *then, f"continue_from={only_run(tmp_path / 'a')}")
        assert told.code == 0 and ends in told.out


@pytest.mark.parametrize(
    ("more", "damaged", "told"),
    [
        ("model.depth=14", False, "its checkpoint is of another model or optim"),
        ("optim.lr=0.01 steps=2", False, "is at step 2 already; expected less than this run's 2"),
        # They are another run's: not to be deleted.
        ("steps=6", True, ": its checkpoints are damaged; expected another run's folder\n"),
    ],
)
def test_mistakes_are_one_line(train, tmp_path, more, damaged, told):
    assert train("grad=bp", "steps=2", f"run_root={tmp_path / 'a'}").code == 0
    source = only_run(tmp_path / "a")
    for file in source.glob("checkpoint*.pt") if damaged else ():
        file.write_bytes(b"")
    more = [f"continue_from={source}", *more.split()]
    outcome = train("grad=bp", f"run_root={tmp_path / 'b'}", *more)
    assert outcome.code == 1 and outcome.err.startswith(f"error: continue_from={source}")
    assert told in outcome.err and outcome.err.count("\n") == 1


def test_records_that_a_resumed_run_lacks_are_told(train, runs):
    assert train("grad=bp", "steps=6", "trainer.log_interval=1").code == 0
    folder = only_run(runs)
    (folder / "DONE").unlink()
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    for kept, told in ((whole, ""), (whole[:2], "its records of steps 3 to 6 are lost")):
        metrics.write_text("".join(kept))
        outcome = train("grad=bp", "steps=6", "trainer.log_interval=1")
        assert outcome.code == 0 and told in outcome.out
        assert ("are lost" in outcome.out) == bool(told)
        (folder / "DONE").unlink()
