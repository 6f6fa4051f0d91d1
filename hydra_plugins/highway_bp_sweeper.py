"""The sweep behind ``python train.py -m``. Hydra takes plugins from a folder of this name alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError
from experiments.identity import config_hash, identity
from experiments.interrupt import StopSignal
from experiments.jobs import SWEEP, Outcome, in_short, tell

REPOSITORY = Path(__file__).parent.parent
EXTRAS = {"joblib": "sweeps", "submitit": "slurm"}  # of pyproject.toml, by the plugin's name

Job = Sequence[str]  # overrides


class Sweeper(BasicSweeper):
    """All combinations, as Hydra's own; besides, no run twice, and no job holds up the others.

    Jobs that make no configuration are told and left out, those that are the same run as another
    are left out, and at the end what has failed is listed. The exit code is 1 then, and 128 + n
    after signal n.
    """

    def setup(self, *, config: DictConfig, **rest: Any) -> None:
        """Raise UserError, naming what to install, where the launcher's plugin is not there."""
        check_installed(config.hydra.launcher._target_)
        super().setup(config=config, **rest)
        self._failed: list[Job] = []
        self._jobs: list[Job] = []

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs, then end this process by SystemExit unless all went well."""
        with _workers_told_to_stop(self.config) as stop:
            try:
                batches = super().sweep(arguments)
            except BrokenProcessPool as error:
                raise UserError(
                    "a process of the sweep was killed, the others were stopped with "
                    "it; the same command goes on from the checkpoints"
                ) from error
        done = [job.return_value for jobs in batches for job in jobs]
        self._finish(done, stop)

    def get_job_batch(self) -> list[Job]:
        """The next jobs, less those that cannot be composed and those that are the same run.

        Raises:
            HydraException, OmegaConfBaseException: none can be composed; the first one's error.
        """
        batch = super().get_job_batch()
        composed, errors = [], []
        for job in batch:
            try:
                composed.append(
                    (
                        job,
                        self.hydra_context.config_loader.load_sweep_config(self.config, list(job)),
                    )
                )
            except (HydraException, OmegaConfBaseException) as error:
                errors.append((job, error))
        if not composed:  # one line for a key that no job knows, and nothing has been done
            raise errors[0][1]
        for same in _by_text(errors):
            jobs = in_short(same[0][0]) + (f" and {len(same) - 1} more" if len(same) > 1 else "")
            tell(same[0][1], f" ({jobs})")
        self._failed += [job for job, _ in errors]
        runs: dict[Any, Job] = {}
        for job, cfg in composed:
            runs.setdefault(run_of(cfg), job)
        self._jobs += runs.values()
        return list(runs.values())

    def validate_batch_is_legal(self, batch: Sequence[Job]) -> None:
        """Hydra's composes all jobs, as `get_job_batch` has done."""

    def _finish(self, outcomes: list[Outcome], stop: StopSignal) -> None:
        jobs = self._failed + self._jobs
        self._failed += [
            job
            for job, outcome in zip(self._jobs, outcomes, strict=True)
            if outcome is Outcome.FAILED
        ]
        elsewhere = outcomes.count(Outcome.ELSEWHERE)
        if elsewhere:
            print(f"{elsewhere} of {len(jobs)} runs were left to another process")
        if self._failed:
            names = "; ".join(_without_the_common(self._failed, jobs))
            print(f"{len(self._failed)} of {len(jobs)} runs failed: {names}", file=sys.stderr)
        if stop.received:
            print(
                f"stopped by signal {stop.received:d}; the same command goes on from here",
                file=sys.stderr,
            )
            sys.exit(128 + stop.received)
        if self._failed:
            sys.exit(1)


def check_installed(launcher: str) -> None:
    """Raise UserError, naming the extra, for a launcher whose plugin is not installed."""
    if launcher in Plugins.instance().class_name_to_class:
        return
    extra = next((extra for name, extra in EXTRAS.items() if name in launcher), "sweeps")
    raise UserError(
        f"hydra/launcher: {launcher.rpartition('.')[2]} is not installed; expected "
        f'its plugin: pip install -e ".[{extra}]"'
    )


def run_of(cfg: DictConfig) -> Any:
    """What tells runs apart: two jobs with the same are one run."""
    only = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    try:
        return config_hash(identity(only, cfg.device)), cfg.device, cfg.seed, cfg.run_root
    except OmegaConfBaseException:  # a value is missing: the job itself will say which
        return object()


def _without_the_common(some: list[Job], jobs: list[Job]) -> list[str]:
    """Overrides of some jobs, but for those that all jobs share."""
    common = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
    return [in_short(o for o in job if o not in common) for job in some]


def _by_text(errors: list[tuple[Job, Exception]]) -> list[list[tuple[Job, Exception]]]:
    """Those of the same text together: a value that is not there fails for every seed."""
    groups: dict[str, list[tuple[Job, Exception]]] = {}
    for job, error in errors:
        groups.setdefault(f"{error} {error.__cause__}", []).append((job, error))
    return list(groups.values())


class _TellWorkers(StopSignal):
    """Keeps the signal, and passes it on by a file: joblib shows no handles of its workers."""

    def __init__(self, file: Path):
        self._file = file

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        self._file.touch()


@contextlib.contextmanager
def _workers_told_to_stop(config: DictConfig) -> Iterator[StopSignal]:
    """While jobs run in processes of joblib, SIGINT and SIGTERM stop them, and no job begins.

    Jobs in this process handle signals themselves; those of submitit belong to no terminal.
    """
    launcher = config.hydra.launcher._target_
    if "BasicLauncher" not in launcher:
        path = os.environ.get("PYTHONPATH")  # jobs of submitit know nothing of this folder
        os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY)
    if "Joblib" not in launcher:
        yield StopSignal()
        return
    file = Path(config.hydra.sweep.dir).absolute() / f".stop-{os.getpid()}"
    file.unlink(missing_ok=True)
    os.environ[SWEEP] = f"{os.getpid()} {file}"
    try:
        with _TellWorkers(file) as stop:
            yield stop
            _send_workers_home()
    finally:
        file.unlink(missing_ok=True)
        del os.environ[SWEEP]


def _send_workers_home() -> None:
    """joblib keeps its processes, and what they hold of a GPU, until this one ends."""
    from joblib.externals.loky import get_reusable_executor  # as joblib's documentation does it

    get_reusable_executor().shutdown(wait=True)
