"""Which GPU a process trains on, where there are several."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[FileLock] = []


def take_one_gpu() -> None:
    """Of several GPUs, let this process see only the first free one; if none is free, share one.

    The process keeps the GPU until it ends. Call this before CUDA is initialised, because CUDA
    counts the GPUs only once. Under torchrun it does nothing: there LOCAL_RANK chooses the GPU.
    """
    count = torch.cuda.device_count()
    if count < 2 or "LOCAL_RANK" in os.environ:
        return
    given = os.environ.get(VISIBLE)
    names = given.split(",")[:count] if given else [str(i) for i in range(count)]
    folder = Path(tempfile.gettempdir()) / f"highway-bp-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    name, lock = first_free(names, folder)
    _held.append(lock)
    os.environ[VISIBLE] = name


def first_free(names: Sequence[str], folder: Path) -> tuple[str, FileLock]:
    """Return the first of the names with the fewest locks, and a new lock on it."""
    for nth in itertools.count():
        for name in names:
            lock = FileLock(folder / f"{name.strip().replace('/', '-')}.{nth}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            return name.strip(), lock
