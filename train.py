"""Train a model with a gradient method: python train.py model=resnet110 grad=highway k=3."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config import register_schema
from experiments.errors import UserError

register_schema()
_jobs: list[str] = []
_failed: list[str] = []


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job of a sweep: its failure is told at once, and the others go on."""
    from experiments.run import run  # torch is slow to import: not before the overrides are valid
    from experiments.trainer import Interrupted

    _jobs.append(" ".join(HydraConfig.get().overrides.task))
    try:
        run(cfg, dict(HydraConfig.get().runtime.choices))
    except (UserError, OmegaConfBaseException) as error:
        _tell(error)
        _failed.append(_jobs[-1])
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + interrupted.signum)


def _tell(error: Exception) -> None:
    """One line, with the reason Hydra keeps in the cause and without its search path."""
    text = str(error).split("Config search path")[0].removeprefix("In 'config': ")
    text, unknown_key, _ = text.partition("To append to")
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text = text.strip(" .\n") + ": " + str(error.__cause__).split("full_key")[0]
    if unknown_key:
        text = text.rstrip() + "; python train.py --cfg job shows all keys"
    print(f"error: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on: told in one line
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _tell(error)
        sys.exit(1)
    except ValueError as error:  # Hydra's, for experiment=null and the like
        if _jobs:
            raise
        _tell(error)
        sys.exit(1)
    except BrokenPipeError:  # train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if _jobs:
            raise
        # before any job there is only the folder for multirun.yaml
        print(f"error: run_root: {error}; expected a folder that can be written", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if _failed and len(_jobs) > 1:
        print(f"{len(_failed)} of {len(_jobs)} runs failed: {'; '.join(_failed)}", file=sys.stderr)
    sys.exit(1 if _failed else 0)
