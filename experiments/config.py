"""The configuration's schema, and the identity of a run."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError

# What may differ between two runs of one and the same experiment.
_NOT_IDENTITY = ("run_root", "logger", "device", "seed", "k", "gamma", "advise", "diagnostics")
_NOT_IDENTITY_INSIDE = {
    "data": ("root", "cache_dir", "workers"),
    "trainer": (
        "eval_interval",
        "checkpoint_interval",
        "log_interval",
        "progress",
        "threads",
        "eval_batch_size",
        "snapshots",
    ),
}


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


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What makes the run what it is: the resolved config without paths, device and loggers.

    The root keys k and gamma count only where the gradient method uses them, so runs of backprop
    coincide.
    """
    config = copy.deepcopy(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    for key in _NOT_IDENTITY:
        config.pop(key, None)
    for group, keys in _NOT_IDENTITY_INSIDE.items():
        for key in keys:
            config[group].pop(key, None)
    if config["continue_from"] is None:
        del config["continue_from"]
    parallel = config.pop("parallel")
    if parallel["layers"]:  # the layers of a process are a group, and groups are the method's
        config["parallel"] = {
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "sizes": parallel["sizes"],
            # which batch normalisation sees
            **{key: parallel[key] for key in ("data", "micro_batches") if parallel[key] != 1},
        }
    return config


def setup_hash(config: dict[str, Any]) -> str:
    """The hash of what runs share that may be compared: all but gradient method and schedule."""
    return config_hash({key: v for key, v in config.items() if key not in ("grad", "schedule")})


def config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
