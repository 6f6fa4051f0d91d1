"""The progress of training: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys

from tqdm import tqdm

MINUTE = 60.0  # seconds between two lines
LINE = "{desc}: step {n_fmt} of {total_fmt}{postfix}\n"


def progress_bar(name: str, total: int, done: int, wanted: bool | str) -> tqdm:
    """Return a bar over ``total`` steps, of which ``done`` were done before.

    wanted: "auto" (a bar on a terminal, lines elsewhere), True (a bar), or False (neither).
    """
    if wanted == "auto" and not sys.stderr.isatty():
        look = {"file": sys.stdout, "bar_format": LINE, "delay": MINUTE}
        look |= {"mininterval": MINUTE, "maxinterval": MINUTE, "miniters": 1}
    else:
        look = {"disable": not wanted, "unit": "step", "mininterval": 0.5}
    return tqdm(total=total, initial=done, desc=name, **look)
