"""How torch works in this process: threads, memory, precision, determinism."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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
