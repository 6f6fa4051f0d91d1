"""A run's folder: its identity, metrics (JSON lines), row, DONE, and the lock of its process."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from experiments import checkpoint
from experiments.errors import UserError
from experiments.files import read_json_lines, write_atomically, write_text

LOCK, STARTED = "lock", "started.json"
PATIENCE = 0.1  # seconds; `is_busy` of another process may hold the lock for an instant


def is_busy(path: Path) -> bool:
    """Whether a process is at work in a run's folder."""
    try:
        if (path / LOCK).exists():
            FileLock(path / LOCK).acquire(blocking=False).lock.release()
    except Timeout:
        return True
    except OSError:  # this file system has no locks
        return False
    return False


class RunFolder:
    """One run's files.

    Args:
        path: named after the run; nothing is written before ``create``.
        writes: whether this process writes the files; of several processes, only the first does.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self._metrics = path / "metrics.jsonl"

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder, with what identifies the run; UserError if it cannot be written."""
        self._write("config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")

    @property
    def finished(self) -> bool:
        """Whether DONE and a readable row are here; UserError if the records are damaged."""
        self.records()
        # If the row is damaged, the last checkpoint will make it again.
        return (self.path / "DONE").exists() and bool(self.row)

    @property
    def row(self) -> dict[str, Any]:
        """Row of the finished run; {} if there is none or the file is damaged."""
        return self._object("row.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Lock the folder until the block or this process ends; yield False if another has it."""
        lock, free = FileLock(self.path / LOCK), True
        try:
            if self.writes:
                lock.acquire(timeout=PATIENCE)
        except Timeout:
            free = False
        except OSError as error:
            print(f"{self.path}: cannot be locked ({error}); let one process alone train it")
        try:
            yield free
        finally:
            lock.release()

    def start(self, about: dict[str, Any]) -> None:
        """Write started.json: what is trained here, since when, by which process."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        by = {"started": now, "pid": os.getpid(), "host": socket.gethostname()}
        self._write(STARTED, json.dumps({**about, **by}, indent=1) + "\n")

    def started(self) -> dict[str, Any]:
        """Return what `start` wrote last; {} if there is nothing or the file is damaged."""
        return self._object(STARTED)

    def append(self, record: dict[str, Any]) -> None:
        """Add one metrics record, with a key "step"; UserError if the disk is full."""
        if not self.writes:
            return
        try:
            with open(self._metrics, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._metrics} ({error})") from error

    def records(self) -> list[dict[str, Any]]:
        """Return all complete records; UserError if one of them is damaged."""
        return read_json_lines(self._metrics, "step") if self._metrics.exists() else []

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after training step ``step``, which will be computed again; return the
        others."""
        records = self.records() if self.writes and step else []
        kept = [r for r in records if r["step"] < step or (r["step"] == step and "train_loss" in r)]
        self._write(self._metrics.name, "".join(json.dumps(r) + "\n" for r in kept))
        return kept

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, as `experiments.checkpoint.save` does."""
        if self.writes:
            checkpoint.save(self.path, state)

    def keep(self, name: str, state: dict[str, Any]) -> Path:
        """Write ``state`` to the file ``name``; return its path."""
        if self.writes:
            write_atomically(self.path / name, lambda f: torch.save(state, f))
        return self.path / name

    def finish(self, row: dict[str, Any]) -> None:
        """Write row.json, then DONE."""
        self._write("row.json", json.dumps(row, indent=1) + "\n")
        self._write("DONE", "")

    def _object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} if there is no file or it is damaged."""
        try:
            found = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            write_text(self.path / name, text)
