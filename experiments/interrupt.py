"""SIGINT and SIGTERM let the step finish and the checkpoint be written."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Interrupted(Exception):
    """A signal arrived; the checkpoint is written."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum:d}")
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignal:
    """While active, remembers the first signal in ``received``; a second SIGINT interrupts.

    Besides SIGINT and SIGTERM it takes SIGUSR2 where somebody listens to it: submitit, whose job
    has little time left.

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


class WorkerStop(StopSignal):
    """Of a worker of a sweep. It never interrupts: how long to wait is the sweep's decision."""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


_of_worker: WorkerStop | None = None


def stop_signal() -> StopSignal:
    """For a block that trains: a new one, in a worker of a sweep the one of its process."""
    return StopSignal() if _of_worker is None else _of_worker


def in_worker() -> WorkerStop:
    """Make this process a worker of a sweep, in which a signal is remembered between jobs too.

    So a job that is still loading its data stops as soon as it trains, and no other begins.
    """
    global _of_worker
    if _of_worker is None:
        _of_worker = WorkerStop()
        _of_worker.__enter__()
    return _of_worker
