"""Decoded data sets kept as tensors in one memory-mapped file each.

The file's name is a hash of the source files and of the preprocessing, so a changed source or a
changed setting is another file and nothing is ever stale.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from experiments.errors import UserError

Tensors = dict[str, Tensor]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/highway_bp`, by default `~/.cache/highway_bp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "highway_bp"


def cache_key(files: Iterable[Path], preprocessing: Mapping[str, object]) -> str:
    """A hash of the files' names, sizes (bytes) and modification times (ns) and of the settings."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([stats, preprocessing], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def cached(path: Path, build: Callable[[], Tensors]) -> Tensors:
    """The tensors of the file `path`, memory-mapped; built and written first if need be.

    A file that is cut off or whose bytes do not fit their checksum is built again. Raises
    UserError if the folder cannot be written.
    """
    if path.exists():
        tensors = _read(path)
        if tensors is not None:
            return tensors
    tensors = build()
    try:
        _write(path, tensors)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {path.parent} cannot be written ({error}); give a folder with room "
            f"for the decoded data set"
        ) from error
    return tensors


def _read(path: Path) -> Tensors | None:
    """The file's tensors, or None where it is damaged."""
    try:
        content = torch.load(path, mmap=True, weights_only=True)
        tensors, checksums = content["tensors"], content["checksums"]
        intact = checksums == _checksums(tensors)
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, UnpicklingError):
        return None
    return tensors if intact else None


def _write(path: Path, tensors: Tensors) -> None:
    """Beside its place first, then renamed: a reader sees a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        try:
            torch.save({"tensors": tensors, "checksums": _checksums(tensors)}, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _checksums(tensors: Tensors) -> dict[str, int]:
    return {name: zlib.crc32(tensor.numpy()) for name, tensor in tensors.items()}
