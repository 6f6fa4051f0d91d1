"""The one exception that means "the user can fix this", and who of several processes reports it."""

from __future__ import annotations

import os
import time

GRACE = 3.0  # seconds in which a process that knows more may report; torchrun then ends the others


class UserError(Exception):
    """A user's mistake or a broken input, reported in one line.

    The line names the argument or file, what was received and what would be right. `train.py`
    prints it without a traceback and exits with a non-zero code.
    """


def turn_to_report() -> str:
    """Let the first of torchrun's processes on this machine report what all see; it ends first.

    Returns:
        What goes before an error's line: "rank 1: ", nothing on the first process of all.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) != "0":
        time.sleep(GRACE)
    return "" if rank == "0" else f"rank {rank}: "
