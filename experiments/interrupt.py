"""SIGINT and SIGTERM let the step finish and the checkpoint be written."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum}")
        self.exit_code = 128 + signum


class StopSignal:
    """While active, the first signal is kept in ``received``; a second SIGINT interrupts."""

    received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
