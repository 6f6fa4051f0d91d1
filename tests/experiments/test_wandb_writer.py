"""wandb: a real offline run, read back from its file; and the writer that is not there."""

import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate

from experiments.config import composed
from experiments.errors import UserError
from experiments.wandb_writer import NoWriter, WandbWriter, group_name, method_name
from tests.train_cli import only_run

pytestmark = pytest.mark.slow

ABOUT = {
    "experiment": "digits",
    "model": "resnet20",
    "grad": "highway",
    "k": 3,
    "schedule": None,
    "tolerance": None,
    "gamma": 0.0,
    "group_size": 1,
    "window": None,
    "seed": 2,
    "setup": "0a1b2c3d",
    "mgrit": None,
}
RUN = {"config": {"learning_rate": 0.25}, "about": ABOUT}


def records(file: Path) -> list:
    """The run's protobuf records, as `wandb sync` reads them: LevelDB's log format, one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found = file.read_bytes(), []
    assert data[:4] == b":W&B"
    assert len(data) < 2**15  # one block: no record is split
    at = 7  # the file's header; then per record: checksum, length, type (1 is a whole record)
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1
        found.append(Record.FromString(data[at + 7 : at + 7 + length]))
        at += 7 + length
    return found


def by_kind(folder: Path) -> dict[str, list]:
    """The records of the one offline run in a run's folder."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    kinds: dict[str, list] = {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        kinds.setdefault(kind, []).append(getattr(record, kind))
    return kinds


def load(logger: str):
    return instantiate(composed(f"logger={logger}").logger)


def no_network(*_):
    raise AssertionError("offline mode asked for the network")


def test_an_offline_run_is_whole_and_quiet(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    writer = load("wandb_offline")(folder=tmp_path, run_id="kept1234", **RUN)
    assert writer.run_id == "kept1234"
    writer.log({"train_loss": 2.5}, step=7)
    writer.finish({"eval_accuracy": 0.75})
    wandb.teardown()  # finish may return before wandb's service has flushed; exiting waits
    assert capfd.readouterr() == ("", "")

    found = by_kind(tmp_path)
    run = found["run"][0]
    assert (run.run_id, run.project, run.display_name, run.run_group, run.job_type, *run.tags) == (
        "kept1234",
        "highway-bp",
        "highway k=3 s2",
        "digits-0a1b2c3d",
        "highway",
        "digits",
    )
    config = {c.key: c.value_json for c in run.config.update}
    assert {"learning_rate": "0.25", "k": "3", "seed": "2", "method": '"highway k=3"'}.items() <= (
        config.items()
    )
    (history,) = found["history"]
    logged = {i.key or i.nested_key[0]: i.value_json for i in history.item}
    assert float(logged["train_loss"]) == 2.5
    assert int(logged["_step"]) == 7
    over_time = {m.glob_name or m.name: m.step_metric for m in found["metric"]}
    assert over_time == {"seconds": "", "*": "seconds"}
    assert "eval_accuracy" in str(found["summary"])
    assert found["exit"][0].exit_code == 0


@pytest.mark.slow
def test_what_is_synced_later_has_group_name_and_row(train, runs):
    """The whole way, from train.py to the file that `wandb sync` uploads."""
    wandb = pytest.importorskip("wandb")
    assert train("logger=wandb_offline", "logger.group=mine", "grad=bp", "steps=1").code == 0
    wandb.teardown()
    found = by_kind(only_run(runs))
    run, summary = found["run"][0], str(found["summary"])
    assert (run.display_name, run.run_group, run.job_type) == ("bp s0", "mine", "bp")
    assert list(run.tags) == ["digits_tiny"]
    assert all(f'"{key}"' in summary for key in ("eval_accuracy", "config_hash", "seconds"))


def test_a_run_killed_before_its_first_checkpoint_keeps_its_id(train, runs, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("experiments.trainer.Trainer.train", lambda self: 1 / 0)
    arguments = ("logger=wandb_offline", "logger.project=p", "steps=1")
    assert train(*arguments).code == 1 and fake.kwargs["id"] is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train(*arguments).code == 0 and fake.kwargs["id"] == "new"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"grad": "bp", "k": None, "gamma": None, "group_size": None}, "bp"),
        ({}, "highway k=3"),
        ({"gamma": 0.2, "group_size": 4}, "highway gamma=0.2 group_size=4 k=3"),
        ({"gamma": "auto", "k": None, "schedule": "linear"}, "highway gamma=auto linear"),
        (
            {"grad": "truncated_bptt", "k": None, "gamma": None, "window": 16},
            "truncated_bptt window=16",
        ),
    ],
)
def test_a_method_has_a_name(changes, name):
    assert method_name(ABOUT | changes) == name


def test_a_group_is_what_may_be_compared():
    assert group_name(ABOUT | {"k": 1, "seed": 0}) == group_name(ABOUT) == "digits-0a1b2c3d"
    assert group_name(ABOUT | {"experiment": None}) == "resnet20-0a1b2c3d"


class FakeWandb:
    """wandb's face as far as the writer uses it; keeps what it was called with."""

    def __init__(self, refuses: Exception | None = None):
        self.errors = SimpleNamespace(Error=ConnectionError)
        self.exits: list[int] = []
        self.refuses = refuses

    def Settings(self, **kwargs) -> dict:
        return kwargs

    def init(self, **kwargs) -> SimpleNamespace:
        if self.refuses:
            raise self.refuses
        self.kwargs = kwargs
        finish = lambda exit_code: self.exits.append(exit_code)  # noqa: E731
        nothing = lambda *_, **__: None  # noqa: E731
        return SimpleNamespace(
            id=kwargs["id"] or "new", summary={}, finish=finish, log=nothing, define_metric=nothing
        )


def test_online_resumes_the_run_it_was(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = load("wandb_online")(folder=tmp_path, run_id="kept1234", **RUN)
    assert writer.run_id == "kept1234"
    keys = ("mode", "resume", "project", "entity", "dir", "group")
    asked = {key: fake.kwargs[key] for key in keys}
    assert asked == {
        "mode": "online",
        "resume": "allow",
        "project": "highway-bp",
        "entity": None,
        "dir": str(tmp_path),
        "group": "digits-0a1b2c3d",
    }


@pytest.mark.parametrize(("row", "code"), [({"eval_accuracy": 0.5}, 0), (None, 1)])
def test_a_run_without_a_row_has_failed(tmp_path, monkeypatch, row, code):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter(mode="offline", project="p", folder=tmp_path, **RUN)
    writer.finish(row)
    assert fake.exits == [code]


def test_wandb_that_refuses_to_start_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(ConnectionError("No API key")))
    with pytest.raises(UserError, match=r"online.*No API key.*logger=none"):
        load("wandb_online")(folder=tmp_path, **RUN)


def test_wandb_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed"):
        load("wandb_offline")(folder=tmp_path, **RUN)


def test_none_writes_nothing_and_keeps_the_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    writer = load("none")(folder=tmp_path, run_id="kept1234", **RUN)
    assert isinstance(writer, NoWriter)
    writer.log({"train_loss": 1.0}, step=1)
    writer.finish({"eval_accuracy": 0.5})
    assert writer.run_id == "kept1234"
    assert list(tmp_path.iterdir()) == []
