"""wandb: a real offline run, read back from its file; and the writer that is not there."""

import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.wandb_writer import NoWriter, WandbWriter

CONFIGS = Path(__file__).parents[2] / "configs" / "logger"
RUN = {"config": {"learning_rate": 0.25}, "name": "a-run", "group": "resnet20"}


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


def load(logger: str):
    return instantiate(OmegaConf.load(CONFIGS / f"{logger}.yaml"))


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

    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    assert file.name == "run-kept1234.wandb"
    by_kind: dict[str, list] = {}
    for record in records(file):
        by_kind.setdefault(record.WhichOneof("record_type"), []).append(record)
    run = by_kind["run"][0].run
    assert (run.run_id, run.project, run.display_name, run.run_group) == (
        "kept1234", "highway-bp", "a-run", "resnet20",
    )  # fmt: skip
    assert {c.key: c.value_json for c in run.config.update}["learning_rate"] == "0.25"
    (history,) = by_kind["history"]
    logged = {i.key or i.nested_key[0]: i.value_json for i in history.history.item}
    assert float(logged["train_loss"]) == 2.5
    assert int(logged["_step"]) == 7
    assert "eval_accuracy" in str(by_kind["summary"])
    assert by_kind["exit"][0].exit.exit_code == 0


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
        return SimpleNamespace(id=kwargs["id"] or "new", summary={}, finish=finish)


def test_online_resumes_the_run_it_was(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = load("wandb_online")(folder=tmp_path, run_id="kept1234", **RUN)
    assert writer.run_id == "kept1234"
    asked = {key: fake.kwargs[key] for key in ("mode", "resume", "project", "entity", "dir")}
    assert asked == {"mode": "online", "resume": "allow", "project": "highway-bp",
                     "entity": None, "dir": str(tmp_path)}  # fmt: skip


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
