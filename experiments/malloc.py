"""On a CPU, keep freed memory for the next step instead of handing it back to the system."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Avoid page faults: each training step frees its activations and asks for them again.

    Only glibc has these settings; elsewhere, or under another allocator, nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(setting, 2**31 - 1)
