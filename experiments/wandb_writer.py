"""wandb as a second writer beside the metrics file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from experiments.errors import UserError


class WandbWriter:
    """A real wandb run inside the run's folder; offline ones are uploaded by ``wandb sync``.

    Args:
        mode: "offline" or "online".
        run_id: the run's id from its checkpoint when it is resumed.

    Raises:
        UserError: wandb is not installed or refuses to start.
    """

    def __init__(self, *, mode: str, project: str, folder: Path, config: dict[str, Any],
                 name: str, group: str, entity: str | None = None, run_id: str | None = None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("logger: wandb is not installed; install it or use logger=none") from (
                error)
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self._run = wandb.init(
                mode=mode, project=project, entity=entity, dir=str(folder), config=config,
                name=name, group=group, id=run_id, resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:  # no key, no network, no permission
            raise UserError(
                f"logger: wandb cannot start in mode={mode} ({error}); use logger=wandb_offline or "
                "logger=none"
            ) from error

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def log(self, record: dict[str, Any], step: int) -> None:
        self._run.log(record, step=step)

    def finish(self, row: dict[str, Any] | None = None) -> None:
        self._run.summary.update(row or {})
        self._run.finish(exit_code=0 if row else 1)


class NoWriter:
    """The same face without wandb."""

    def __init__(self, run_id: str | None = None, **_: Any):
        self.run_id = run_id

    def log(self, record: dict[str, Any], step: int) -> None:
        """Nothing: the metrics file has it."""

    def finish(self, row: dict[str, Any] | None = None) -> None:
        """Nothing to close."""
