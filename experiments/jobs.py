"""One job of train.py, alone or in a sweep, and how its failure is reported."""

import os
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config import check
from experiments.errors import BeingTrained, UserError, one_line, wait_for_first_rank
from experiments.interrupt import Interrupted, in_worker


def attempt(cfg: DictConfig) -> bool:
    """Run one job, and report a failure. Return whether it failed: a sweep's other jobs go on.

    Raises SystemExit if a job outside a sweep failed, or a signal has stopped this process.
    """
    hydra = HydraConfig.get()
    alone, launcher = hydra.mode == RunMode.RUN, hydra.launcher._target_
    job = "" if alone else f" ({in_short(hydra.overrides.task)})"
    if not alone:
        if "Joblib" in launcher and in_worker().received:
            return False
        print(f"{hydra.job.name}: {in_short(hydra.overrides.task)}", flush=True)
    try:
        if alone and "BasicLauncher" not in launcher:
            asked = f"hydra/launcher={hydra.runtime.choices['hydra/launcher']}"
            raise UserError(f"{asked} is for sweeps; expected python train.py -m {asked} ...")
        choices = dict(hydra.runtime.choices)
        check(cfg, choices)
        from experiments.run import run  # imports torch, which is slow: only for valid values

        run(cfg, choices, list(hydra.overrides.task))
        return False
    except BeingTrained as elsewhere:
        print(f"{elsewhere}, skipped")
        return False
    except (UserError, OmegaConfBaseException) as error:
        report(error, job)
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGUSR2:  # submitit's handler requeues the job
            signal.getsignal(signal.SIGUSR2)(signal.SIGUSR2, None)
        if alone or "BasicLauncher" in launcher:
            print(f"stopped by {interrupted}; the same command goes on from here", file=sys.stderr)
            sys.exit(interrupted.exit_code)
        return False
    except BrokenPipeError:  # the reader of the output has gone: train.py ends quietly
        raise
    except Exception as error:  # a bug, or memory ran out: only this job fails
        wait_for_first_rank()
        traceback.print_exc()
        if not alone:
            print(f"error: {type(error).__name__}{job}", file=sys.stderr)
    if alone:
        sys.exit(1)
    return True


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
