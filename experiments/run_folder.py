"""A run's folder: resolved config, metrics (JSON lines), row, DONE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.atomic import write_text
from experiments.errors import UserError


class RunFolder:
    """One run's files. ``config`` holds what identifies the run, ``path`` is named after it."""

    def __init__(self, path: Path, config: dict[str, Any]):
        """Nothing is written before ``create``.

        Raises:
            UserError: the folder was made with another configuration (the key is named).
        """
        self.path = path
        self._metrics = path / "metrics.jsonl"
        self._config = json.dumps(config, indent=1, sort_keys=True) + "\n"
        file = path / "config.json"
        if file.exists() and file.read_text() != self._config:
            raise UserError(
                f"{path} was made with another configuration ({_difference(file, self._config)}); "
                "choose another run_root or delete the folder"
            )

    def create(self) -> None:
        """Make the folder with its config.json; UserError if it cannot be written."""
        write_text(self.path / "config.json", self._config)

    @property
    def finished(self) -> bool:
        return (self.path / "DONE").exists()

    def append(self, record: dict[str, Any]) -> None:
        """Add one metrics record; it has a key "step".

        Raises:
            UserError: the disk is full or the folder is gone.
        """
        try:
            with open(self._metrics, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._metrics} ({error})") from error

    def records(self) -> list[dict[str, Any]]:
        """All whole records; a last line cut off by a crash is left out.

        Raises:
            UserError: a line before the last is damaged.
        """
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text(errors="replace").splitlines(keepends=True)
        return [self._record(i, line) for i, line in enumerate(lines, 1) if line.endswith("\n")]

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self._metrics} line {number} is damaged; expected a JSON record: mend the line, "
                f"or delete {self.path} to start anew"
            ) from error

    def keep_until(self, step: int) -> None:
        """Drop what was recorded after ``step``: it is going to be computed again."""
        kept = [json.dumps(r) + "\n" for r in self.records() if 0 < step >= r["step"]]
        write_text(self._metrics, "".join(kept))

    def finish(self, row: dict[str, Any]) -> None:
        """Write row.json, then DONE."""
        write_text(self.path / "row.json", json.dumps(row, indent=1) + "\n")
        write_text(self.path / "DONE", "")


def _difference(file: Path, text: str) -> str:
    try:
        old = json.loads(file.read_text())
    except json.JSONDecodeError:
        return "its config.json is damaged"
    new = _flat(json.loads(text))
    old = _flat(old)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"{key}: {old.get(key)} there, {new.get(key)} now"
    return "another layout"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"depth": 20}} -> {"model.depth": 20}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return flat
