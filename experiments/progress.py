"""The progress of training: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

MINUTE = 60.0  # seconds between two lines

Item = TypeVar("Item")


class Progress:
    """Progress over ``total`` steps, of which ``done`` were done before.

    Args:
        wanted: "auto" (a bar on a terminal, lines elsewhere), True (a bar), or False (neither).
    """

    def __init__(self, name: str, total: int, done: int, wanted: bool | str) -> None:
        bar = sys.stderr.isatty() if wanted == "auto" else wanted
        self._name, self._total, self._step = name, total, done
        self._lines, self._last = wanted == "auto" and not bar, time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, disable=not bar, unit="step", desc=name, mininterval=0.5
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: type | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def evaluating(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches of an evaluation, and show their number."""
        for n, batch in enumerate(batches, 1):
            self.show({"evaluating batch": str(n)}, refresh=True)
            yield batch

    def step(self) -> None:
        self._step += 1
        self._bar.update()

    def show(self, scores: Mapping[str, str], refresh: bool = False) -> None:
        """Show scores beside the bar (with refresh, at once) or, once a minute, as a line."""
        self._bar.set_postfix(scores, refresh=refresh)
        if self._lines and time.monotonic() - self._last >= MINUTE:
            self._last = time.monotonic()
            shown = "".join(f", {name} {score}" for name, score in scores.items())
            print(f"{self._name}: step {self._step} of {self._total}{shown}", flush=True)
