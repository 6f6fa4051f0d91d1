"""Files of JSON records, one in a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.errors import UserError


def parse(lines: Iterable[str], path: Path, *keys: str) -> list[dict[str, Any]]:
    """The records of ``lines``, from the file ``path``.

    Raises:
        UserError: a line is no JSON object with these keys.
    """
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            expected = " with ".join(["a JSON object", *map(repr, keys)])
            raise UserError(
                f"{path} line {number} is not {expected}; expected one record in a line: mend or "
                "delete it"
            )
        records.append(record)
    return records


def read(path: Path, *keys: str) -> list[dict[str, Any]]:
    """`parse` the whole file."""
    return parse(path.read_text(errors="replace").splitlines(), path, *keys)
