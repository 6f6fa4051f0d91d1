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
AGAIN = 0.2  # seconds between two looks

CLOSED, SILENT, MISTAKE = "closed", "silent", "mistake"  # connection, other side; or one's own


class ToldElsewhere(Exception):
    """This process ends with ``code``; what there is to say, another one says or has said."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


class Failures:
    """Every process leaves word of its failure where all can read it; the first one tells.

    Where all have lost touch with one that has left no word, that one is named.

    Args:
        connect: makes a connection to the processes' store; two are made, one for a thread that
            looks after the others while the process waits for a message.
        timeout: seconds after which a process that does not answer is given up.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store = connect()
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
        kind = kind_of(error)
        self._store.set(f"failed/{self.rank}", f"{kind}\n{error}")
        self._store.set("trouble", "")
        if self.rank == 0 and kind == MISTAKE:
            return self._told(self._store, str(error))
        self._wait(GRACE, lambda: len(self._left(self._store, "failed")) == self.size)
        # the processes before this one tell, if they can
        self._wait(self.rank * AHEAD, lambda: self._store.check(["told"]))
        return self._told(self._store, self._summary(self._store))

    def _wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not enough():
            time.sleep(AGAIN)

    def _told(self, store: dist.Store, line: str) -> str:
        if store.add("told", 1) > 1:
            raise ToldElsewhere(1)
        return line

    def _left(self, store: dist.Store, what: str) -> dict[int, str]:
        """By rank what it has left under that name."""
        return {
            rank: store.get(f"{what}/{rank}").decode()
            for rank in range(self.size)
            if store.check([f"{what}/{rank}"])
        }

    def _summary(self, store: dist.Store) -> str:
        failed, here = self._left(store, "failed"), self._left(store, "here")
        kinds = set()
        for rank, word in failed.items():
            kind, _, text = word.partition("\n")
            if kind == MISTAKE:
                return text if rank == 0 else f"rank {rank}: {text}"
            kinds.add(kind)
        quiet = [rank for rank in range(self.size) if rank not in failed]
        lost = [rank for rank in quiet if rank not in here] or quiet
        if not lost:
            return "the processes have lost touch with each other; is the network up?"
        how = f"not answered for {self.timeout:g} s" if SILENT in kinds else "died"
        return (
            f"lost touch with rank {', '.join(map(str, lost))}, which has {how}; expected all "
            "to be at work"
        )

    def _watch(self, store: dist.Store) -> None:
        """Answer, when another process has failed; the first one, which may be waiting in vain
        for a message, then tells of it and ends."""
        try:
            while not store.check(["trouble"]):
                time.sleep(AGAIN)
            store.set(f"here/{self.rank}", "")
            if self.rank:
                return
            time.sleep(GRACE + AHEAD / 2)
            line = self._told(store, self._summary(store))
        except (dist.DistError, ToldElsewhere):  # the store has gone, or all is told
            return
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)


def kind_of(error: Exception) -> str:
    """Whether a message has not come through, for which the fault is another process's, or not."""
    told = str(error)
    if not is_lost_touch(error):
        return MISTAKE
    return SILENT if "imed out" in told or "imeout" in told else CLOSED


def is_lost_touch(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
