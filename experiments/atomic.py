"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from experiments.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, rename it into place.

    Raises:
        UserError: the folder cannot be written or the disk is full; ``path`` keeps its old content.
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
