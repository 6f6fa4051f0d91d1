"""One job of train.py, alone or in a sweep, and how its failure is reported."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from enum import Enum
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError, one_line, wait_for_first_rank
from experiments.interrupt import Interrupted, in_worker
from experiments.progress import about
from experiments.run_folder import BeingTrained

_took: list[float] = []  # seconds of each run of a sweep that this process has finished


class Outcome(Enum):
    """The result of a job; a launcher returns it from the process in which the job ran."""

    DONE = "done"  # now, or in an earlier call
    FAILED = "failed"
    ELSEWHERE = "being trained by another process"
    STOPPED = "stopped by a signal, or not begun because of one"


def attempt(cfg: DictConfig) -> Outcome:
    """Run one job. Report a failure and return it as the outcome: a sweep's other jobs go on.

    Raises:
        SystemExit: a job outside a sweep failed, or a signal has stopped this process.
    """
    from experiments.run import run  # imports torch, which is slow: only if the overrides are valid

    hydra = HydraConfig.get()
    alone = hydra.mode == RunMode.RUN
    job = "" if alone else f" ({in_short(hydra.overrides.task)})"
    if "Joblib" in hydra.launcher._target_ and not alone and in_worker().received:
        return Outcome.STOPPED
    if not alone:
        print(f"{hydra.job.name}{_time_left(hydra)}: {in_short(hydra.overrides.task)}", flush=True)
    begin = time.monotonic()
    try:
        if alone and "BasicLauncher" not in hydra.launcher._target_:
            launcher = f"hydra/launcher={hydra.runtime.choices['hydra/launcher']}"
            raise UserError(f"{launcher} is for sweeps; expected python train.py -m {launcher} ...")
        folder = run(cfg, dict(hydra.runtime.choices), list(hydra.overrides.task))
        if not alone:
            before = json.loads((folder / "row.json").read_text())["seconds"]
            _took.append(max(before, time.monotonic() - begin))
        return Outcome.DONE
    except BeingTrained as elsewhere:
        print(f"{elsewhere}, skipped")
        return Outcome.ELSEWHERE
    except (UserError, OmegaConfBaseException) as error:
        report(error, job)
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGUSR2:  # submitit's handler requeues the job
            signal.getsignal(signal.SIGUSR2)(signal.SIGUSR2, None)
        if alone or "BasicLauncher" in hydra.launcher._target_:
            print(f"stopped by {interrupted}; the same command goes on from here", file=sys.stderr)
            sys.exit(interrupted.exit_code)
        return Outcome.STOPPED
    except BrokenPipeError:  # the reader of the output has gone: train.py ends quietly
        raise
    except Exception as error:  # a bug, or memory ran out: only this job fails
        wait_for_first_rank()
        traceback.print_exc()
        if not alone:
            print(f"error: {type(error).__name__}{job}", file=sys.stderr)
    if alone:
        sys.exit(1)
    return Outcome.FAILED


def _time_left(hydra: DictConfig) -> str:
    """Estimate the sweep's time left from the mean of its finished runs; "" if none is finished."""
    _, number, _, total = hydra.job.name.split()  # run 3 of 21
    if number == "1":
        _took.clear()  # these are of another sweep
    at_once = hydra.launcher.get("n_jobs", 1)
    if not _took or at_once < 1:
        return ""
    turns = math.ceil((int(total) - int(number) + 1) / at_once)
    return f", about {about(turns * sum(_took) / len(_took))} left"


def report(error: Exception, job: str = "") -> None:
    """Print a user's mistake in one line."""
    who = wait_for_first_rank()
    print(f"error: {who}{one_line(error)}{job}", file=sys.stderr)


def in_short(overrides: Iterable[str]) -> str:
    """Return a job's overrides in a line, without those that do not change what is trained."""
    beside = ("run_root=", "logger", "device=", "hydra", "trainer.threads=", "trainer.progress=")
    return " ".join(override for override in overrides if not override.startswith(beside))


def leave() -> NoReturn:
    """End this process with exit code 0; under torchrun, wait until all processes get here.

    Skip gloo's teardown: it sometimes aborted processes after all their work was done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)
