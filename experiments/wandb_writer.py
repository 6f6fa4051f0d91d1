"""wandb as a second writer beside the metrics file."""

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.row import method_name


def flat(errors: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return gradient errors as plain numbers: {"gradient_error/cosine/k1": 0.8, ...}."""
    names = ("cosine", "relative_error", "increment")
    return {f"gradient_error/{name}/k{e['k']}": e[name] for e in errors for name in names}


class WandbWriter:
    """A wandb run inside the run's folder; ``wandb sync`` uploads an offline one.

    Runs that may be compared are one group, also across sweeps. The method is the job type. By
    default, panels show everything against seconds of training.

    about: the fields of the run's row that are known before the run begins. run_id: None for a new
    one. UserError if wandb is not there or refuses to start.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        folder: Path,
        about: dict[str, Any],
        entity: str | None = None,
        run_id: str | None = None,
        group: str | None = None,
    ):
        try:
            import wandb
        except ImportError as error:
            raise UserError("logger: wandb is not installed; install it or use logger=none") from (
                error
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("HOME", os.path.expanduser("~"))  # without it wandb prints its log
        logging.raiseExceptions = False  # no traceback if the disk is full; we report that
        method = method_name(about)
        sorted_by = {"method": method, "k": about["k"], "seed": about["seed"]}
        try:
            self._run = wandb.init(
                mode=mode,
                project=project,
                entity=entity,
                dir=str(folder),
                config={**about["config"], **sorted_by},
                name=f"{method} s{about['seed']}",
                group=group or f"{about['experiment'] or about['model']}-{about['setup']}",
                job_type=about["grad"],
                tags=[about["experiment"]] if about["experiment"] else None,
                id=run_id or secrets.token_hex(4),  # WANDB_RUN_ID would be the same for all seeds
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:  # no key, no network; bad WANDB_...
            raise UserError(
                f"logger: wandb cannot start in mode={mode} ({error}); use logger=wandb_offline or "
                "logger=none"
            ) from error
        self._run.define_metric("seconds")
        self._run.define_metric("*", step_metric="seconds")

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def log(self, record: dict[str, Any]) -> None:
        """Add a record of metrics.jsonl; wandb ignores records before its last step."""
        values = {key: value for key, value in record.items() if key != "gradient_error"}
        errors = flat(record.get("gradient_error", []))
        self._run.log({**values, **errors}, step=record["step"])

    def finish(self, row: dict[str, Any] | None = None) -> None:
        self._run.summary.update(row or {})
        self._run.finish(exit_code=0 if row else 1)


class NoWriter:
    """The same interface without wandb."""

    def __init__(self, run_id: str | None = None, **_: Any):
        self.run_id = run_id

    def log(self, record: dict[str, Any]) -> None:
        """Do nothing: the metrics file has the record."""

    def finish(self, row: dict[str, Any] | None = None) -> None:
        """Do nothing: there is nothing to close."""
