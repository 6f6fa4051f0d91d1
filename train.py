"""Train a model with a gradient method: python train.py model=resnet110 grad=highway k=3.

A sweep, with -m: python train.py -m model=resnet110 grad=bp,highway k=0,1,2,3 seed=0,1,2
"""

import os
import sys

import hydra
from omegaconf import DictConfig

from experiments.command_line import options_first
from experiments.config import register_help
from experiments.errors import COMPOSING, UserError
from experiments.jobs import attempt, leave, report

register_help()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> bool:
    """Run one job; return whether it failed. hydra_plugins/highway_bp_sweeper.py runs sweeps."""
    return attempt(cfg)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors; we print one line each
    try:
        sys.argv[1:] = options_first(sys.argv[1:])
        main()
    except (UserError, *COMPOSING) as error:
        report(error)
        sys.exit(1)
    except BrokenPipeError:  # e.g. train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # before the first job, Hydra writes only the folder of multirun.yaml
        print(f"error: run_root: {error}; expected a folder that can be written", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    leave()
