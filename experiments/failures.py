"""What becomes of a run's processes when one of them fails: one line, told by one of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

GRACE = 2.0  # seconds in which others may notice as well
AHEAD = 2.0  # seconds that each has over the next one
AGAIN = 0.1  # seconds between two looks


class ToldElsewhere(Exception):
    """This process ends with ``code``; what there is to say, another one says or has said."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


class Failures:
    """Every process leaves word of its failure where all can read it; the first one tells.

    Where all have lost touch with one that has left no word, that one is named.

    Args:
        connect: makes a connection to the processes' store; two are made, as a waiting one blocks.
        timeout: seconds after which a process that does not answer is given up.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store = connect()
        if rank == 0:
            threading.Thread(target=self._watch, args=[connect()], daemon=True).start()

    def line(self, error: Exception) -> str:
        """What this process is to tell of its error and the others'.

        Raises:
            ToldElsewhere: another one tells.
        """
        try:
            return self._line(error)
        except dist.DistError as lost:
            gone = str(lost).splitlines()[0]
            return f"rank {self.rank}: {error}; and rank 0 or its machine is gone ({gone})"

    def _line(self, error: Exception) -> str:
        self._store.set(f"failed/{self.rank}", "" if is_lost_touch(error) else str(error))
        if self.rank == 0 and not is_lost_touch(error):
            return self._told(self._store, str(error))
        self._wait(GRACE, lambda: len(self._found(self._store)) == self.size)
        # the processes before this one tell, if they can
        self._wait(self.rank * AHEAD, lambda: self._store.check(["told"]))
        return self._told(self._store, self._summary(self._found(self._store)))

    def _wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not enough():
            time.sleep(AGAIN)

    def _told(self, store: dist.Store, line: str) -> str:
        if store.add("told", 1) > 1:
            raise ToldElsewhere(1)
        return line

    def _found(self, store: dist.Store) -> dict[int, str]:
        """By rank what it has left: empty where it has only lost touch."""
        return {rank: store.get(f"failed/{rank}").decode() for rank in range(self.size)
                if store.check([f"failed/{rank}"])}  # fmt: skip

    def _summary(self, found: dict[int, str]) -> str:
        for rank, text in found.items():
            if text:
                return text if rank == 0 else f"rank {rank}: {text}"
        lost = [str(rank) for rank in range(self.size) if rank not in found]
        if not lost:
            return "the processes have lost touch with each other; is the network up?"
        return (f"lost touch with rank {', '.join(lost)}: dead, or without an answer for "
                f"{self.timeout:g} s; expected all to be at work")  # fmt: skip

    def _watch(self, store: dist.Store) -> None:
        """End this process, which may be waiting in vain, when another one has failed."""
        while True:
            time.sleep(AGAIN)
            try:
                found = self._found(store)
            except dist.DistError:  # the store has gone, and with it what this could see
                return
            if any(text for rank, text in found.items() if rank):
                time.sleep(AHEAD / 2)  # it may be about to fail likewise, and will tell itself
                try:
                    line = self._told(store, self._summary(found))
                except ToldElsewhere:
                    return
                print(f"error: {line}", file=sys.stderr, flush=True)
                os._exit(1)


def is_lost_touch(error: Exception) -> bool:
    """Whether a message has not come through, for which the fault is another process's."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
