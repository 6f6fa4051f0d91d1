"""The one exception that means "the user can fix this", and how and by whom it is reported."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

GRACE = 10.0  # seconds in which a process that knows more may report; torchrun then ends the others


# What Hydra raises while it makes a configuration of arguments that a user has mistaken.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError)


class UserError(Exception):
    """A user's mistake or a broken input, reported in one line.

    The line names the argument or file, what was received and what would be right. `train.py`
    prints it without a traceback and exits with a non-zero code.
    """


@contextlib.contextmanager
def naming(where: str, *more: type[Exception]) -> Iterator[None]:
    """Make what is said of wrong arguments a UserError that says ``where`` they are.

    more: kinds of exceptions beside TypeError and ValueError.
    """
    try:
        yield
    except (TypeError, ValueError, *more) as error:
        raise UserError(f"{where}: {one_line(error)[:300]}") from error


def one_line(error: BaseException) -> str:
    """What an exception of a user's making says, with its cause, without Hydra's further advice.

    Hydra and OmegaConf keep the reason in the cause, the key in `full_key`, and append their
    search path and types.
    """
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not KEY=VALUE, or a value with such characters as = # ~ that has "
            """to be quoted twice: "run_root='a=b'\""""
        )
    text = str(error).split("Config search path")[0].split("full_key")[0]
    text = text.removeprefix("In 'config': ").removeprefix("In 'hydra/config': ")
    text, unknown_key, _ = text.partition("To append to")
    if "hydra" in type(error).__module__ and error.__cause__ is not None:
        text = text.strip(" .\n") + ": " + str(error.__cause__).split("full_key")[0]
    key = getattr(error, "full_key", None)
    if key and key not in text:
        text = f"{key}: {text}"
    if unknown_key:
        text = text.rstrip() + "; python train.py --cfg job shows all keys"
    return " ".join(text.split())


def turn_to_report() -> str:
    """Let the first of torchrun's processes on this machine report what all see; it ends first.

    Returns:
        What goes before an error's line: "rank 1: ", nothing on the first process of all.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) != "0":
        time.sleep(GRACE)
    return "" if rank == "0" else f"rank {rank}: "
