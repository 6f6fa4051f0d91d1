"""How far training has come: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

MINUTE = 60.0  # seconds between two lines


class Progress:
    """Of ``total`` steps, ``done`` of which were done before.

    Args:
        wanted: a bar: "auto" (on a terminal, lines elsewhere), True, or False for neither.
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

    def step(self) -> None:
        self._step += 1
        self._bar.update()

    def show(self, scores: Mapping[str, str]) -> None:
        """Beside the bar, or as a line if the last one is a minute ago."""
        self._bar.set_postfix(scores, refresh=False)
        if self._lines and time.monotonic() - self._last >= MINUTE:
            self._last = time.monotonic()
            shown = "".join(f", {name} {score}" for name, score in scores.items())
            print(f"{self._name}: step {self._step} of {self._total}{shown}", flush=True)
