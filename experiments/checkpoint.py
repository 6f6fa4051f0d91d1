"""Checkpoints: atomic, two kept, read with ``weights_only=True``."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from experiments.errors import UserError
from experiments.files import write_atomically

LATEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
NEEDED = {"step", "method", "config_hash"}  # a checkpoint of any version has these
FRESH = "checkpoint.new.pt"  # complete; stays only after a crash before the last rename


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as the latest checkpoint; the one before is kept as the previous.

    If that fails, it raises UserError, and the last good checkpoint stays.
    """
    latest, fresh = folder / LATEST, folder / FRESH
    for left_over in folder.glob(f".{FRESH}.*.partial"):  # of a process killed while it wrote
        left_over.unlink(missing_ok=True)
    write_atomically(fresh, lambda f: torch.save(state, f))
    try:
        if latest.exists():
            os.replace(latest, folder / PREVIOUS)
        os.replace(fresh, latest)
    except OSError as error:
        raise UserError(f"cannot rename {fresh} to {latest} ({error})") from error


def files(folder: Path) -> list[Path]:
    """Return its checkpoints, damaged or not, the newest first."""
    return [folder / name for name in (FRESH, LATEST, PREVIOUS) if (folder / name).exists()]


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint that is not damaged, and say if it is not the newest.

    None if there is no checkpoint; UserError if all are damaged.
    """
    found = files(folder)
    damage: Exception | None = None
    for file in found:
        try:
            state = _read(file)
        except Exception as error:  # which one depends on the damaged bytes
            damage = error
            continue
        if file is not found[0]:
            print(f"{found[0]} is damaged; going on from {file.name}")
        return state
    if found:
        raise UserError(
            f"{found[0]} is damaged and no other checkpoint is whole; delete {folder} to start anew"
        ) from damage
    return None


def _read(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:  # torch.load itself does not look at the checksums
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum does not match")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not state.keys() >= NEEDED or type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"not a checkpoint: {NEEDED}, step from 0")
    return state
