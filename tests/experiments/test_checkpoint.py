"""Checkpoints: whatever goes wrong, the last good one is found, and that is said."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, files
from experiments.checkpoint import FRESH, LATEST, PREVIOUS
from experiments.errors import UserError


def state(step: int) -> dict:
    weight = torch.full((64, 64), float(step))
    others = {"method": [], "schedule": {}, "optimizer": {}, "config_hash": "0"}
    return {"step": step, "model": {"weight": weight}, "rng": torch.get_rng_state(), **others}


def flip_a_weight(file: Path) -> None:
    """One bit of a stored tensor, which torch.load on its own would not notice."""
    data = bytearray(file.read_bytes())
    place = data.index(torch.full((64,), float(torch.load(file)["step"])).numpy().tobytes())
    data[place + 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one bit of a weight": flip_a_weight,
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: torch.save([1, 2], file),
    "no state": lambda file: torch.save({}, file),
    "another step": lambda file: torch.save(state(-1), file),
    "code": lambda file: torch.save({"step": 1, "call": os.getcwd}, file),
    "other bytes": lambda file: file.write_bytes(bytes(range(256)) * 8),
}


class FullDisk(io.FileIO):
    """Takes the first bytes, then there is no space left."""

    def write(self, data) -> int:
        if self.tell() > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:100])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_latest_is_loaded_and_two_are_kept(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    loaded = checkpoint.load(tmp_path)
    assert capsys.readouterr().out == ""
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])
    assert torch.equal(loaded["rng"], torch.get_rng_state())
    assert names(tmp_path) == [PREVIOUS, LATEST]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_latest_gives_the_previous_and_all_damaged_is_an_error(tmp_path, capsys, damage):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    damage(tmp_path / LATEST)
    assert checkpoint.load(tmp_path)["step"] == 1
    said = capsys.readouterr().out
    assert LATEST in said and "damaged" in said and PREVIOUS in said
    damage(tmp_path / PREVIOUS)
    with pytest.raises(UserError, match="damaged") as told:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_full_disk_is_told_and_the_last_good_one_stays(tmp_path, monkeypatch, capsys, broken):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    with monkeypatch.context() as patch:
        if broken == "write":
            patch.setattr(files, "open", FullDisk, raising=False)
        else:
            patch.setattr(files.os, "fsync", raise_full)
        with pytest.raises(UserError, match="disk") as told:
            checkpoint.save(tmp_path, state(3))
    assert str(tmp_path) in str(told.value)
    assert names(tmp_path) == [PREVIOUS, LATEST]
    assert checkpoint.load(tmp_path)["step"] == 2
    assert capsys.readouterr().out == ""


def raise_full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_between_the_renames_loses_nothing(tmp_path, monkeypatch, renames):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    real, done = os.replace, []

    def crash(source, target) -> None:
        if Path(target).name != FRESH:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, state(3))
    assert checkpoint.load(tmp_path)["step"] == 3
    checkpoint.save(tmp_path, state(4))
    assert checkpoint.load(tmp_path)["step"] == 4
    assert names(tmp_path) == [PREVIOUS, LATEST]


def test_what_a_killed_process_left_half_written_goes_with_the_next_save(tmp_path):
    (tmp_path / f".{FRESH}.123.partial").write_bytes(b"half")
    checkpoint.save(tmp_path, state(1))
    assert names(tmp_path) == [LATEST]
