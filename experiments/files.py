"""Files that are either whole or not there, and files of JSON records, one in a line."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from experiments.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, rename it into place.

    If that fails, it raises UserError, and ``path`` keeps its old content.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        with contextlib.suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise UserError(f"cannot write {path} ({error}); is the disk full or read-only?") from error


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda f: f.write(text.encode()))


def read_json_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The records of a file; UserError for a line that is no JSON object.

    key: of a whole number in each record, for files that grow by a line at a time. A last line of
    theirs that was cut off by a crash is left out.
    """
    lines, records = path.read_text(errors="replace").splitlines(keepends=True), []
    if key and lines and not lines[-1].endswith("\n"):
        del lines[-1]
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
