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
    """Of several GPUs let this process see the first that no other run has; if none, share one.

    It is taken until the process ends. To be called before CUDA is initialised, which counts the
    GPUs once and for all. Processes of torchrun keep to the number it gives them.
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
    """The name of which the fewest locks are taken, the first of equals, and one more lock."""
    for nth in itertools.count():
        for name in names:
            lock = FileLock(folder / f"{name.strip().replace('/', '-')}.{nth}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            return name.strip(), lock
