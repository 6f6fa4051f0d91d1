"""Files of JSON records, one in a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.errors import UserError


def parse(lines: Iterable[str], path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The records of ``lines``, from the file ``path``.

    Raises:
        UserError: a line is no JSON object, or has no whole number under this key.
    """
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if not isinstance(record, dict) or (key and type(record.get(key)) is not int):
            expected = f"a JSON object with a whole number {key!r}" if key else "a JSON object"
            raise UserError(f"{path} line {number} is not {expected}; mend or delete this line")
        records.append(record)
    return records


def read(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """`parse` the whole file."""
    return parse(path.read_text(errors="replace").splitlines(), path, key)
