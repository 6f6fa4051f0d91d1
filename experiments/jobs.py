"""One job of train.py, alone or in a sweep: what becomes of it, told at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError
from experiments.failures import ToldElsewhere
from experiments.interrupt import Interrupted, StopSignal
from experiments.run_folder import BeingTrained

SWEEP = "HIGHWAY_BP_SWEEP"  # in joblib's workers: process id of their sweep, and its stop file


class Outcome(Enum):
    """What became of a job; a launcher brings it back from whatever process the job ran in."""

    DONE = "done"  # now or before
    FAILED = "failed"
    ELSEWHERE = "being trained by another process"
    STOPPED = "stopped by a signal, or not begun because of one"


def attempt(cfg: DictConfig) -> Outcome:
    """Do one job. A failure is told and is the outcome, so that the others of a sweep go on.

    Raises:
        SystemExit: it failed and is no job of a sweep, or a signal has stopped the process that
            was started by hand.
    """
    worker = Worker.of_this_process()
    if worker is None:
        return _attempt(cfg)
    if worker.stopping:
        return Outcome.STOPPED
    with worker.at_work():
        return _attempt(cfg)


def _attempt(cfg: DictConfig) -> Outcome:
    from experiments.run import run  # torch is slow to import: not before the overrides are valid

    alone = HydraConfig.get().mode == RunMode.RUN
    job = "" if alone else f" ({in_short(HydraConfig.get().overrides.task)})"
    try:
        with checkpoint_before_requeue() as requeue:
            hydra = HydraConfig.get()
            run(cfg, dict(hydra.runtime.choices), list(hydra.overrides.task))
        return Outcome.DONE
    except BeingTrained as elsewhere:
        print(f"{elsewhere}, skipped")
        return Outcome.ELSEWHERE
    except (UserError, OmegaConfBaseException) as error:
        tell(error, job)
    except Interrupted as interrupted:
        requeue()
        if alone or "BasicLauncher" in HydraConfig.get().launcher._target_:
            print(f"stopped by {interrupted}; the same command goes on from here", file=sys.stderr)
            sys.exit(interrupted.exit_code)
        return Outcome.STOPPED
    except ToldElsewhere as elsewhere:
        sys.exit(elsewhere.code)
    except BrokenPipeError:  # of whoever reads what is printed: train.py ends quietly
        raise
    except Exception as error:  # a bug, or memory ran out: only this job is over
        traceback.print_exc()
        if not alone:
            print(f"error: {type(error).__name__}{job}", file=sys.stderr)
    if alone:
        sys.exit(1)
    return Outcome.FAILED


def tell(error: Exception, job: str = "") -> None:
    """One line, with the reason Hydra keeps in the cause and without its search path.

    Of several processes that train one model, all of which see the mistake, the first one tells.
    """
    if os.environ.get("RANK", "0") != "0" and "parallel=layers" in sys.argv:
        return
    text = str(error).split("Config search path")[0]
    text = text.removeprefix("In 'config': ").removeprefix("In 'hydra/config': ")
    text, unknown_key, _ = text.partition("To append to")
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text = text.strip(" .\n") + ": " + str(error.__cause__).split("full_key")[0]
    if unknown_key:
        text = text.rstrip() + "; python train.py --cfg job shows all keys"
    print(f"error: {' '.join(text.split())}{job}", file=sys.stderr)


def in_short(overrides: Iterable[str]) -> str:
    """A job's overrides in a line, but for those that do not change what is trained."""
    beside = ("run_root=", "logger", "device=", "hydra", "trainer.threads=", "trainer.progress=")
    return " ".join(override for override in overrides if not override.startswith(beside))


def leave() -> NoReturn:
    """End this process, all being well; of several under torchrun, once all have come here.

    gloo's teardown was seen to abort processes now and then after all their work was done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


class Worker:
    """A process that joblib started for a sweep.

    The sweep's process alone is told to stop, by a signal; it makes the stop file. Whoever kills
    that process leaves its workers behind: they stop too, so that nothing trains on unseen.
    """

    _here: Worker | None = None
    SECONDS = 0.2  # between two looks

    def __init__(self, sweep: int, stop_file: Path):
        self.sweep, self.stop_file, self._busy = sweep, stop_file, False
        for number in (signal.SIGINT, signal.SIGTERM):  # in a terminal, Ctrl-C reaches all
            signal.signal(number, self._not_now)
        threading.Thread(target=self._watch, daemon=True).start()

    @classmethod
    def of_this_process(cls) -> Worker | None:
        """The same at every call; None in a process that joblib did not start."""
        if cls._here is None and SWEEP in os.environ:
            sweep, stop_file = os.environ[SWEEP].split(" ", 1)
            if int(sweep) != os.getpid():
                cls._here = cls(int(sweep), Path(stop_file))
        return cls._here

    @property
    def stopping(self) -> bool:
        return self._left_behind or self.stop_file.exists()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @property
    def _left_behind(self) -> bool:
        return os.getppid() != self.sweep

    def _not_now(self, *_: object) -> None:
        """Only a run that trains listens, by `StopSignal`: it has something to save."""

    def _watch(self) -> None:
        while True:
            time.sleep(self.SECONDS)
            if self._left_behind and not self._busy:
                os._exit(1)
            if self.stopping:  # again and again: training may begin only later
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


@contextlib.contextmanager
def checkpoint_before_requeue() -> Iterator[Callable[[], None]]:
    """In a job of submitit: let training write its checkpoint before the job is put back in line.

    submitit does the latter inside the handler of the signal that comes shortly before the time is
    up, wherever the job is then. Yields what is to be called when training has stopped; it returns
    only if that signal was not the reason.
    """
    put_back = signal.getsignal(signal.SIGUSR2)
    if not callable(put_back):  # no submitit
        yield lambda: None
        return
    asked: list[int] = []

    def stop_training(number: int, frame: object) -> None:
        if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), StopSignal):
            asked.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            put_back(number, frame)

    signal.signal(signal.SIGUSR2, stop_training)
    try:
        yield lambda: put_back(asked[0], None) if asked else None
    finally:
        signal.signal(signal.SIGUSR2, put_back)
