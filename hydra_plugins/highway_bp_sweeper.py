"""The sweeper of ``python train.py -m``. Hydra takes plugins only from a folder of this name."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import COMPOSING, UserError
from experiments.identity import config_hash, identity
from experiments.interrupt import StopSignal
from experiments.jobs import Outcome, in_short, report

REPOSITORY = str(Path(__file__).parent.parent)
EXTRAS = {"joblib": "sweeps", "submitit": "slurm"}  # in pyproject.toml, by the plugin's name

Job = Sequence[str]  # overrides


class Sweeper(BasicSweeper):
    """Run all combinations, as Hydra's own sweeper, but no run twice; a failed job stops no other.

    Jobs without a valid configuration are reported and left out. At the end, if jobs failed, they
    are listed and the exit code is 1; after signal n it is 128 + n.
    """

    def setup(self, *, config: DictConfig, **rest: Any) -> None:
        """Set up the sweep; raise UserError if the launcher's plugin is not installed."""
        launcher = config.hydra.launcher._target_
        if launcher not in Plugins.instance().class_name_to_class:
            extra = next((extra for name, extra in EXTRAS.items() if name in launcher), "sweeps")
            raise UserError(
                f"hydra/launcher: {launcher.rpartition('.')[2]} is not installed; expected "
                f'its plugin: pip install -e ".[{extra}]"'
            )
        super().setup(config=config, **rest)
        self._jobs: list[Job] = []
        self._failed: list[Job] = []

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs, then end this process by SystemExit unless all went well."""
        launcher = self.config.hydra.launcher._target_
        if "BasicLauncher" in launcher:  # a signal ends this process from inside the job
            batches, stop = super().sweep(arguments), StopSignal()
        else:  # jobs in other processes have to find our packages
            os.environ["PYTHONPATH"] = REPOSITORY + os.pathsep + os.environ.get("PYTHONPATH", "")
            in_workers = "joblib" in launcher
            stop = StopSignal(then=_terminate_workers)
            with stop if in_workers else contextlib.nullcontext():  # SLURM's jobs go on without us
                batches = self._sweep_in_processes(arguments, stop)
        self._finish([job.return_value for jobs in batches for job in jobs], stop)

    def _sweep_in_processes(self, arguments: list[str], stop: StopSignal) -> list:
        try:
            return super().sweep(arguments)
        except BrokenProcessPool as error:
            if stop.received:  # the process was still importing
                sys.exit(128 + stop.received)
            raise UserError(
                "a process of the sweep was killed; the same command resumes"
            ) from error
        except RuntimeError as error:
            if "submitit" not in type(error).__module__:
                raise
            line = (str(error) or str(error.__cause__)).splitlines()[0]
            raise UserError(f"SLURM: {line}; the same command resumes") from error
        finally:
            _end_workers()

    def get_job_batch(self) -> list[Job]:
        """Return the next jobs, without those that cannot be composed or that repeat a run.

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
            except COMPOSING as error:
                errors.setdefault(f"{error} {error.__cause__}", error)
                self._failed.append(job)
        if not runs:
            none = UserError("a sweep of no runs; expected a value for every key")
            raise next(iter(errors.values()), none)
        for error in errors.values():
            report(error)
        self._jobs += runs.values()
        total = len(runs)
        return [
            [*job, f"hydra.job.name='run {i} of {total}'"] for i, job in enumerate(runs.values(), 1)
        ]

    def validate_batch_is_legal(self, batch: Sequence[Job]) -> None:
        """Do nothing: `get_job_batch` has composed all jobs."""

    def _finish(self, outcomes: list[Outcome], stop: StopSignal) -> None:
        jobs = [*self._failed, *self._jobs]
        n, common = len(jobs), set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        outcome_of = zip(self._jobs, outcomes, strict=True)
        self._failed += [job for job, outcome in outcome_of if outcome is Outcome.FAILED]
        if elsewhere := outcomes.count(Outcome.ELSEWHERE):
            print(f"{elsewhere} of {n} runs were left to another process")
        if self._failed:
            names = "; ".join(in_short(o for o in job if o not in common) for job in self._failed)
            print(f"{len(self._failed)} of {n} runs failed: {names}", file=sys.stderr)
        if stop.received:
            print(f"stopped by signal {stop.received:d}; the same command goes on from here")
            sys.exit(128 + stop.received)
        if self._failed:
            sys.exit(1)


def run_of(config: DictConfig) -> Any:
    """Return what identifies a run: two jobs with equal results are one run."""
    only = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        return config_hash(identity(only, config.device)), config.seed, config.run_root
    except OmegaConfBaseException:  # a value is missing: the job itself will say which
        return object()


def _terminate_workers() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _end_workers() -> None:
    """End joblib's idle workers: after a signal they were seen to keep this process for minutes."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is not None:
        loky.get_reusable_executor(reuse=True).shutdown(kill_workers=True)
