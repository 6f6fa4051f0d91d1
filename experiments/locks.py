"""Files of which one process at a time can have the lock; the kernel takes it back on any end."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

TRIES, PAUSE = 4, 0.01  # seconds; `is_locked` of another process may have it for an instant


def try_lock(path: Path) -> TextIO | None:
    """The open file, locked until it is closed, or None while another process has the lock.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    file = open(path, "a+")  # noqa: SIM115  closed by whoever holds the lock
    for last in range(TRIES - 1, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if last:
                time.sleep(PAUSE)
        except OSError:
            file.close()
            raise
    file.close()
    return None


def is_locked(path: Path) -> bool:
    """Whether some process has the lock; False where there are no locks."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
