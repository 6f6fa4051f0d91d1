"""The configuration's schema: types and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError


@dataclass
class RootKeys:
    """Types of the root keys; inside a group, an unknown key is Hydra's error (struct mode)."""

    k: int = 3
    gamma: Any = 0.0
    seed: int = 0
    steps: int | None = None
    advise: bool = False
    continue_from: str | None = None
    device: str = "auto"
    run_root: str = "runs"
    data: Any = None
    optim: Any = None
    trainer: Any = None
    logger: Any = None
    grad: Any = None
    schedule: Any = None
    diagnostics: Any = None
    parallel: Any = None
    model: Any = None


def register_schema() -> None:
    """Make the types known to Hydra under the name the primary config uses."""
    ConfigStore.instance().store(name="schema", node=RootKeys)


CONFIGS = Path(__file__).parent.parent / "configs"


def composed(*overrides: str) -> DictConfig:
    """The configuration that train.py makes of these arguments."""
    register_schema()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


# Smallest value of whole numbers; None allowed where the type says so.
_AT_LEAST = {
    "seed": 0,
    "steps": 1,
    "optim.steps": 1,
    "optim.batch_size": 1,
    "optim.warmup_steps": 0,
    "data.train_limit": 1,
    "data.eval_limit": 1,
    "trainer.threads": 1,
    "trainer.eval_batch_size": 1,
    "trainer.eval_interval": 1,
    "trainer.checkpoint_interval": 1,
    "trainer.log_interval": 1,
    "parallel.data": 1,
    "parallel.micro_batches": 1,
    "parallel.timeout": 1,
}
_OPTIONAL = (
    "steps",
    "optim.steps",
    "data.train_limit",
    "data.eval_limit",
    "trainer.threads",
    "trainer.eval_interval",
    "trainer.checkpoint_interval",
)


def check_values(cfg: DictConfig) -> None:
    """Raise UserError for a number no training can be run with, before anything is loaded."""
    for key, least in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in _OPTIONAL:
            continue
        if key.startswith("parallel.") and not cfg.parallel.layers:
            continue  # parallel=none has no such keys
        if type(value) is not int or value < least:
            raise UserError(f"{key}={value}; expected a whole number, at least {least}")
    epochs = OmegaConf.select(cfg, "optim.epochs")
    if epochs is not None and (type(epochs) not in (int, float) or not 0 < epochs < math.inf):
        raise UserError(f"optim.epochs={epochs}; expected a number above 0")
    for key in (
        "optim.lr",
        "optim.warmup_lr",
        "optim.final_lr",
        "optim.weight_decay",
        "optim.momentum",
        "optim.clip",
    ):
        value = OmegaConf.select(cfg, key)
        if value is None and key not in ("optim.lr", "optim.weight_decay"):
            continue  # of another optimiser
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UserError(f"{key}={value}; expected a number, at least 0")
    for key in ("trainer.amp", "trainer.channels_last"):
        value = OmegaConf.select(cfg, key)
        if value not in (True, False, "auto"):
            raise UserError(f"{key}={value}; expected auto, true or false")
    for key in ("trainer.tf32", "trainer.deterministic"):
        value = OmegaConf.select(cfg, key)
        if type(value) is not bool:
            raise UserError(f"{key}={value}; expected true or false")
