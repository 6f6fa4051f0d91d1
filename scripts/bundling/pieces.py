"""Files of a limited size, that together are a tar."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError

MB = 1_000_000  # bytes
MOST_PIECES = 10_000  # four digits, so that the shell's order of names is the pieces' order
NOT_DATA = (".git", ".cache")  # what a clone or a download of the hub leaves beside the files


class Pieces:
    """A stream that is written into ``<stem>.0000``, ``<stem>.0001``, ... of ``limit`` bytes."""

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self.folder, self.stem, self.limit = folder, stem, limit
        self.files: list[Path] = []
        self._file = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            room = self.limit - self._file.tell() if self._file else 0
            if room == 0:
                self._next()
                continue
            self._file.write(rest[:room])
            rest = rest[room:]
        return len(data)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _next(self) -> None:
        self.close()
        if len(self.files) == MOST_PIECES:
            raise UserError(
                f"--piece-mb: {self.limit / MB:g}, more than {MOST_PIECES} pieces of "
                f"{self.stem}; give a larger one"
            )
        file = self.folder / f"{self.stem}.{len(self.files):04d}"
        self._file = file.open("xb")  # x: two data sets must not share a name
        self.files.append(file)


def pack(source: Path, name: str, pieces: Pieces) -> list[Path]:
    """A file or folder as an uncompressed tar in which it is called ``name``.

    Parquet, wheels and git's packs are compressed already.
    """
    with (
        contextlib.closing(pieces),
        tarfile.open(
            mode="w|", fileobj=pieces, format=tarfile.GNU_FORMAT, dereference=True, bufsize=MB
        ) as tar,
    ):
        tar.add(source, name, filter=plain)
    report(name, pieces.files)
    return pieces.files


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Readable, and without owners: nobody on the other machine is who packed it here."""
    if Path(member.name).name in NOT_DATA:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def report(name: str, files: Sequence[Path]) -> None:
    size = sum(file.stat().st_size for file in files)
    print(f"{name}: {size / MB:.1f} MB in {len(files)} files", flush=True)
