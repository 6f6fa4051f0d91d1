"""`UserError`, the exception for mistakes that the user can fix, and how it is reported."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

GRACE = 10.0  # seconds that a process waits, so that one that knows the cause reports first


# Hydra raises these when it cannot compose a configuration from the user's arguments.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError)


class UserError(Exception):
    """A user's mistake or a broken input, reported in one line.

    The line names the argument or file, what was received and what would be right. `train.py`
    prints it without a traceback and exits with a non-zero code.
    """


class BeingTrained(Exception):
    """Another process is at work in a run's folder."""

    def __init__(self, path: Path):
        super().__init__(f"{path} is being trained by another process")


@contextlib.contextmanager
def as_user_error(where: str, *more: type[Exception]) -> Iterator[None]:
    """Turn a TypeError or ValueError into a UserError whose line begins with ``where``.

    more: further exception types to turn into a UserError.
    """
    try:
        yield
    except (TypeError, ValueError, *more) as error:
        raise UserError(f"{where}: {one_line(error)[:300]}") from error


def one_line(error: BaseException) -> str:
    """Return the message of a user's mistake in one line, with its cause, without Hydra's advice.

    Hydra and OmegaConf keep the reason in the cause and the key in `full_key`. They append their
    search path and types to the message.
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
    return " ".join(text.split()) or type(error).__name__


def wait_for_first_rank() -> str:
    """Wait unless this is local rank 0: it reports an error that all processes see, and ends first.

    Returns:
        The prefix of an error's line, for instance "rank 1: "; "" on rank 0.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) != "0":
        time.sleep(GRACE)
    return "" if rank == "0" else f"rank {rank}: "
