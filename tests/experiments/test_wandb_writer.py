"""wandb: a real offline run, read back from its file; and the writer that is not there."""

import json
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate

from experiments.config import composed
from experiments.errors import UserError
from experiments.row import method_name
from experiments.wandb_writer import NoWriter, WandbWriter, flat
from tests.train_cli import only_run, records_of, start_and_kill

pytestmark = pytest.mark.slow

ABOUT = dict(experiment="digits", model="resnet20", grad="highway", k=3, gamma=0.0, group_size=1)
ABOUT |= dict(schedule=None, tolerance=None, window=None, mgrit=None, seed=2, setup="0a1b2c3d")
ABOUT |= dict(config={"learning_rate": 0.25})
RUN = {"about": ABOUT}


def records(file: Path) -> list:
    """The run's protobuf records, as `wandb sync` reads them: LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, part = file.read_bytes(), [], b""
    assert data[:4] == b":W&B"
    at, BLOCK = 7, 2**15  # after the file's header
    while at < len(data):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)  # of a part, the first its checksum
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


def history(found: dict[str, list]) -> dict[int, dict]:
    """What was logged at each step."""
    rows = [
        {i.key or i.nested_key[0]: json.loads(i.value_json) for i in one.item}
        for one in found["history"]
    ]
    return {row["_step"]: row for row in rows}


def by_kind(folder: Path) -> dict[str, list]:
    """The records of the last offline run in a run's folder."""
    file = max((folder / "wandb").glob("offline-run-*/run-*.wandb"))
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
    writer.log({"step": 7, "train_loss": 2.5})
    writer.finish({"eval_accuracy": 0.75})
    wandb.teardown()  # finish may return before wandb's service has flushed; exiting waits
    assert capfd.readouterr() == ("", "")

    found = by_kind(tmp_path)
    run = found["run"][0]
    assert (run.run_id, run.display_name) == ("kept1234", "highway k=3 s2")
    assert (run.project, run.run_group) == ("highway-bp", "digits-0a1b2c3d")
    assert (run.job_type, *run.tags) == ("highway", "digits")
    config = {c.key: c.value_json for c in run.config.update}
    wanted = {"learning_rate": "0.25", "k": "3", "seed": "2", "method": '"highway k=3"'}
    assert wanted.items() <= config.items()
    assert history(found)[7]["train_loss"] == 2.5
    over_time = {m.glob_name or m.name: m.step_metric for m in found["metric"]}
    assert over_time == {"seconds": "", "*": "seconds"}
    assert "eval_accuracy" in str(found["summary"])
    assert found["exit"][0].exit_code == 0


def test_after_kill_minus_nine_the_file_has_every_record_and_the_row(train, tmp_path):
    """Those before the last checkpoint may have been lost with the process that was killed."""
    wandb = pytest.importorskip("wandb")
    arguments = ("experiment=digits_tiny", "logger=wandb_offline", "steps=20", "grad=highway")
    arguments += ("k=1", "diagnostics=figure6", "trainer.threads=1", "logger.group=mine")
    for lines in (3, 15):  # evaluations, and with them checkpoints, are every 3 steps
        start_and_kill(tmp_path, lines, *arguments)
    assert train(*arguments, f"run_root={tmp_path}").code == 0
    wandb.teardown()
    run = only_run(tmp_path)
    found, records = by_kind(run), records_of(run)
    about, summary, rows = found["run"][0], str(found["summary"]), history(found)
    assert (about.display_name, about.run_group) == ("highway k=1 s0", "mine")
    assert (about.job_type, *about.tags) == ("highway", "digits_tiny")
    assert all(f'"{key}"' in summary for key in ("eval_accuracy", "config_hash", "seconds"))
    assert sum("gradient_error" in record for record in records) >= 3
    for record in records:
        record |= flat(record.pop("gradient_error", []))
        assert rows[record["step"]].items() >= record.items()
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1


def test_each_seed_has_an_id_and_keeps_it_when_killed_before_a_checkpoint(train, fake, monkeypatch):
    arguments = ("logger=wandb_offline", "logger.project=p", "steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.trainer.Trainer.train", lambda self: 1 / 0)
        assert train(*arguments).code == 1
    first = fake.kwargs["id"]
    assert train(*arguments).code == 0 and fake.kwargs["id"] == first
    monkeypatch.setenv("WANDB_RUN_ID", first)  # would be one for all seeds
    assert train(*arguments, "seed=1").code == 0 and fake.kwargs["id"] not in (None, first)


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


class FakeWandb:
    """wandb's face as far as the writer uses it; keeps what it was called with."""

    errors, refuses = SimpleNamespace(Error=ConnectionError), None

    def __init__(self):
        self.exits: list[int] = []

    def Settings(self, **kwargs) -> dict:
        return kwargs

    def init(self, **kwargs) -> SimpleNamespace:
        if self.refuses:
            raise self.refuses
        self.kwargs = kwargs
        finish = lambda exit_code: self.exits.append(exit_code)  # noqa: E731
        nothing = lambda *_, **__: None  # noqa: E731
        return SimpleNamespace(
            id=kwargs["id"], summary={}, finish=finish, log=nothing, define_metric=nothing
        )


@pytest.fixture
def fake(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_online_resumes_the_run_it_was(tmp_path, fake):
    writer = load("wandb_online")(folder=tmp_path, run_id="kept1234", **RUN)
    assert writer.run_id == "kept1234"
    asked = dict(mode="online", resume="allow", project="highway-bp", entity=None)
    asked |= dict(dir=str(tmp_path), group="digits-0a1b2c3d")
    assert asked == {key: fake.kwargs[key] for key in asked}


def test_a_run_without_an_experiment_is_in_its_models_group(tmp_path, fake):
    load("wandb_offline")(folder=tmp_path, about=ABOUT | {"experiment": None})
    assert fake.kwargs["group"] == "resnet20-0a1b2c3d"


@pytest.mark.parametrize(("row", "code"), [({"eval_accuracy": 0.5}, 0), (None, 1)])
def test_a_run_without_a_row_has_failed(tmp_path, fake, row, code):
    WandbWriter(mode="offline", project="p", folder=tmp_path, **RUN).finish(row)
    assert fake.exits == [code]


def test_wandb_that_refuses_to_start_is_told_in_one_line(tmp_path, fake):
    fake.refuses = ConnectionError("No API key")
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
    writer.log({"step": 1, "train_loss": 1.0})
    writer.finish({"eval_accuracy": 0.5})
    assert writer.run_id == "kept1234"
    assert list(tmp_path.iterdir()) == []
