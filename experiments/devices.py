"""Which GPU a process trains on, and how torch works in it: threads, memory, precision."""

import ctypes
import itertools
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
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


def prepare_torch(settings: Mapping[str, Any]) -> None:
    """Set threads, memory, and the precision and determinism of CUDA."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    # Not the newer fp32_precision: once it is set, torch.export fails, as it reads allow_tf32.
    torch.backends.cuda.matmul.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.benchmark = not settings["deterministic"]
    torch.use_deterministic_algorithms(settings["deterministic"])
    if settings["deterministic"]:  # cuBLAS needs it before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_freed_memory() -> None:
    """Keep what a training step frees for the next step, which then has fewer page faults.

    Only glibc has these settings; elsewhere, or under another allocator, nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(setting, 2**31 - 1)
