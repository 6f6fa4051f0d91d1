"""On SIGINT and SIGTERM, training finishes its step and writes a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType


class Interrupted(Exception):
    """A signal arrived; the checkpoint is written."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum:d}")
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignal:
    """While active, keeps the last signal in ``received``; a SIGINT after any signal interrupts.

    It handles SIGINT and SIGTERM, and SIGUSR2 if a handler for SIGUSR2 is installed. submitit
    installs one: the signal means that its job has little time left.

    Args:
        then: called at every signal.
    """

    received: signal.Signals | None = None

    def __init__(self, then: Callable[[], object] = lambda: None):
        self._then = then

    def __enter__(self) -> StopSignal:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._then()
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


_of_worker: StopSignal | None = None


def stop_signal() -> AbstractContextManager[StopSignal]:
    """Return a StopSignal for a block that trains; in a sweep's worker, that of the process."""
    return StopSignal() if _of_worker is None else nullcontext(_of_worker)


def in_worker() -> StopSignal:
    """Make this process a worker of a sweep, which also remembers signals between jobs.

    After a signal, a job that is loading its data stops when it trains, and no other job begins.
    """
    global _of_worker
    if _of_worker is None:
        _of_worker = StopSignal().__enter__()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep's process sends SIGTERM then
    return _of_worker
