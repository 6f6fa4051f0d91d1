"""The sweeper of ``python train.py -m``. Hydra takes plugins only from a folder of this name."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import check
from experiments.errors import COMPOSING, UserError
from experiments.identity import config_hash, identity
from experiments.interrupt import StopSignal
from experiments.jobs import in_short, report

REPOSITORY = str(Path(__file__).parent.parent)

Job = Sequence[str]  # overrides


class Sweeper(BasicSweeper):
    """Run all combinations, as Hydra's own sweeper, but no run twice; a failed job stops no other.

    Jobs without a valid configuration are reported and left out. At the end, if jobs failed, they
    are listed and the exit code is 1; after signal n it is 128 + n.
    """

    def setup(self, **given: Any) -> None:
        """Set up the sweep; raise UserError if the launcher's plugin is not installed."""
        try:
            super().setup(**given)
        except RuntimeError as error:
            raise UserError(
                f'hydra/launcher: {error}; expected its plugin: pip install -e ".[sweeps,slurm]"'
            ) from error
        self._jobs: list[Job] = []
        self._refused: list[Job] = []

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs, then end this process by SystemExit unless all went well."""
        # Jobs in other processes have to find our packages.
        os.environ["PYTHONPATH"] = REPOSITORY + os.pathsep + os.environ.get("PYTHONPATH", "")
        launcher, stop = self.config.hydra.launcher._target_, StopSignal(then=_terminate_workers)
        # Without workers, a signal ends this process from inside the job; SLURM's jobs go on.
        with stop if "joblib" in launcher else contextlib.nullcontext():
            try:
                batches = super().sweep(arguments)
            except RuntimeError as error:  # of the launcher: a worker was killed, or sbatch failed
                if stop.received:  # the worker was still importing
                    sys.exit(128 + stop.received)
                line = (str(error) or str(error.__cause__)).splitlines()[0]
                name = launcher.rpartition(".")[2]
                raise UserError(f"{name}: {line}; the same command resumes") from error
            finally:
                _end_workers(kill=bool(stop.received))
        failed = [job.return_value for jobs in batches for job in jobs]
        self._finish([job for job, bad in zip(self._jobs, failed, strict=True) if bad], stop)

    def get_job_batch(self) -> list[Job]:
        """Return the next jobs, without those that cannot run or that repeat a run.

        Each job's name contains its number.

        Raises:
            One of COMPOSING, or UserError: no job can be composed; the first job's error.
        """
        runs: dict[Any, Job] = {}
        errors: dict[str, Exception] = {}  # each once: a wrong value fails for every seed
        for job in super().get_job_batch():
            try:
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
                runs.setdefault(run_of(config), job)
            except (UserError, *COMPOSING) as error:
                errors.setdefault(f"{error} {error.__cause__}", error)
                self._refused.append(job)
        if not runs:
            none = UserError("a sweep of no runs; expected a value for every key")
            raise next(iter(errors.values()), none)
        for error in errors.values():
            report(error)
        self._jobs += runs.values()
        n = len(runs)
        return [
            [*job, f"hydra.job.name='run {i} of {n}'"] for i, job in enumerate(runs.values(), 1)
        ]

    def validate_batch_is_legal(self, batch: Sequence[Job]) -> None:
        """Do nothing: `get_job_batch` has composed all jobs."""

    def _finish(self, failed: list[Job], stop: StopSignal) -> None:
        failed, all_jobs = [*self._refused, *failed], [*self._refused, *self._jobs]
        common = set.intersection(*map(set, all_jobs)) if len(all_jobs) > 1 else set()
        if failed:
            names = "; ".join(in_short(o for o in job if o not in common) for job in failed)
            print(f"{len(failed)} of {len(all_jobs)} runs failed: {names}", file=sys.stderr)
        if stop.received:
            print(f"stopped by signal {stop.received:d}; the same command goes on from here")
            sys.exit(128 + stop.received)
        if failed:
            sys.exit(1)


def run_of(config: DictConfig) -> Any:
    """Return what identifies a run: two jobs with equal results are one run.

    Raises:
        UserError: the run cannot be trained. This is checked first: a wrong value of a key without
            effect has the hash of a right one.
    """
    only = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        check(only, config.hydra.runtime.choices)
        return config_hash(identity(only, config.device)), config.seed, config.run_root
    except OmegaConfBaseException:  # a value is missing: the job itself will say which
        return object()


def _terminate_workers() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _end_workers(kill: bool) -> None:
    """End joblib's idle workers. After a signal, kill them: they were seen to keep this process for
    minutes. Else let them end, as a killed one leaves the semaphore of its progress bar."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is not None:
        loky.get_reusable_executor(reuse=True).shutdown(kill_workers=kill)
