"""The plan of a run, built and checked as far as this needs neither data nor model."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import highway_bp as hb
from experiments.config import LENGTHS, READ_BY, check, signature
from experiments.data.batches import Data
from experiments.devices import take_one_gpu
from experiments.errors import UserError, as_user_error
from experiments.identity import config_hash, flat, identity, precision_of, setup_hash
from experiments.processes import OneProcess, processes_of
from experiments.row import SCHEMA, method_fields, method_name, stored_config, stored_overrides
from experiments.run_folder import RunFolder

SIZES = ("layers", "hidden", "heads", "length", "image_size", "patch_size", "dropout")


class Plan:
    """A configuration and the objects that it describes.

    Args:
        choices: the group choices by name, e.g. {"model": "resnet110", "grad": "highway"}.
        overrides: the arguments ``cfg`` was composed from.

    Raises UserError or OmegaConfBaseException if no training can run with ``cfg``.
    """

    def __init__(
        self, cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()
    ) -> None:
        self.cfg, self.choices, self.overrides = cfg, choices, overrides
        check(cfg, choices)
        self.processes = processes_of(cfg)
        self.method: hb.Method = build(cfg, "grad")
        with self._naming_schedule():
            self.schedule: hb.schedules.Schedule = instantiate(
                cfg.schedule, _partial_=True, _convert_="all"
            )(self.method)
        self.device = _device(cfg.device)
        if cfg.trainer.cuda_graph:
            self._check_graphs()
        if self._fixed_steps:  # refuse a schedule that does not fit before data are loaded
            self.steps(per_epoch=1)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The identity of the run, without its seed."""
        return identity(self.cfg, self.device.type)

    @property
    def settings(self) -> dict[str, Any]:
        """All keys, with dots, and the choices, without the data's folders on this machine."""
        given = dict(flat(OmegaConf.to_container(self.cfg, resolve=True))) | dict(self.choices)
        return {key: v for key, v in given.items() if key not in ("data.root", "data.cache_dir")}

    @property
    def hash(self) -> str:
        return config_hash(self.fields)

    @property
    def folder(self) -> RunFolder:
        """`<model>-<grad>[-<schedule> or -k<k>]-<hash>-<device>-s<seed>` below run_root."""
        schedule, k = self.choices["schedule"], getattr(self.method, "k", None)
        if schedule == "constant":
            schedule = None if k is None else f"k{k}"
        parts = (self.choices["model"], self.choices["grad"], schedule)
        name = [*filter(None, parts), self.hash, self.device.type, f"s{self.cfg.seed}"]
        return RunFolder(Path(self.cfg.run_root, "-".join(name)), self.processes.writes)

    def steps(self, per_epoch: int) -> int:
        """Return the number of training steps; UserError if it is 0 or unfit for the schedule."""
        steps = self._fixed_steps or round(self.cfg.optim.epochs * per_epoch)
        if steps < 1:
            raise UserError(
                f"optim.epochs={self.cfg.optim.epochs} of {per_epoch} steps each; expected at "
                "least one step"
            )
        with self._naming_schedule():
            self.schedule.method_for(0, steps)  # raises if it does not fit
        return steps

    def without_effect(self) -> list[str]:
        """Return a line for each key that was given and has no effect, because of another one."""
        given = sorted({override.partition("=")[0].lstrip("+") for override in self.overrides})
        reasons = {key: self._overridden_by(key) for key in given}
        return [
            f"{key}={OmegaConf.select(self.cfg, key)} has no effect with {why}"
            for key, why in reasons.items()
            if why
        ]

    def _overridden_by(self, key: str) -> str | None:
        """Return what makes a key have no effect, for instance "grad=bp", or None."""
        cfg, optim, choices = self.cfg, self.cfg.optim, self.choices
        group, _, name = key.rpartition(".")
        if key in ("k", "gamma"):
            if key not in cfg.grad:
                return f"grad={choices['grad']}"
            if cfg.grad[key] != cfg[key]:
                return f"grad.{key}={cfg.grad[key]}"
            if key == "k" and choices["schedule"] not in ("constant", "bp_every"):
                return f"schedule={choices['schedule']}, which sets it"
        elif key in LENGTHS:
            first = next(one for one in LENGTHS if OmegaConf.select(cfg, one) is not None)
            if LENGTHS.index(key) > LENGTHS.index(first):
                return f"{first}={OmegaConf.select(cfg, first)}"
        elif group == "optim" and name in set.union(*READ_BY.values()):
            if name not in READ_BY[optim.algorithm] | READ_BY[optim.schedule]:
                return f"optim.algorithm={optim.algorithm} and optim.schedule={optim.schedule}"
        elif group == "parallel" and not cfg.parallel.layers:
            return f"parallel={choices['parallel']}"
        elif group == "model" and name in SIZES and cfg.model.get("pretrained"):
            return f"model.pretrained={cfg.model.pretrained}, which has its own sizes"
        return None

    def in_words(self) -> str:
        """For instance "resnet32 on cifar10, bp, 9 steps in batches of 128, seed 0, on cpu"."""
        cfg, choices = self.cfg, self.choices
        length = f"{self._fixed_steps} steps" if self._fixed_steps else f"{cfg.optim.epochs} epochs"
        method = method_name(method_fields(cfg, choices["schedule"], self.method))
        return (
            f"{choices['model']} on {choices['data']}, {method}, {length} in batches of "
            f"{cfg.optim.batch_size}, seed {cfg.seed}, on {self.device.type}"
        )

    def about(self, data_name: str, per_epoch: int, model: nn.Module) -> dict[str, Any]:
        """Return the fields of the run's row that are known before the run begins."""
        cfg, steps = self.cfg, self.steps(per_epoch)
        return {
            "schema": SCHEMA,
            "config_hash": self.hash,
            "setup": setup_hash(self.fields),
            "seed": cfg.seed,
            "device_kind": self.device.type,
            "experiment": self.choices.get("experiment"),
            "overrides": stored_overrides(self.overrides),
            "config": stored_config(cfg),
            "model": self.choices["model"],
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **method_fields(cfg, self.choices["schedule"], self.method),
            "precision": precision_of(cfg.trainer, self.device.type),
            "data": data_name,
            "steps": steps,
            "epochs": steps / per_epoch,
            "batch_size": cfg.optim.batch_size,
            **self.processes.fields,
        }

    def model_for(self, data: Data) -> nn.Module:
        """Return the model for these data; UserError if it does not take their arguments."""
        given = data.model_arguments()
        with as_user_error(
            f"model={self.choices['model']} does not fit data={self.choices['data']}, which gives "
            f"{' and '.join(sorted(given))}"
        ):
            arguments = {key: None for key in self.cfg.model if key != "_target_"} | given
            signature(self.cfg.model).bind(**arguments)
        return build(self.cfg, "model", **given)

    def _check_graphs(self) -> None:
        """Raise UserError for settings without a graph, e.g. if values on the device decide."""
        reasons = {
            f"device={self.device.type}": self.device.type != "cuda",
            "parallel=layers": type(self.processes) is not OneProcess,
            "grad.tolerance": getattr(self.method, "tolerance", None) is not None,
            "gamma=auto": not isinstance(getattr(self.method, "gamma", 0.0), Real),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise UserError(f"trainer.cuda_graph: true with {', '.join(found)}; expected false")

    @property
    def _fixed_steps(self) -> int | None:
        return self.cfg.steps or self.cfg.optim.steps

    def _naming_schedule(self):
        return as_user_error(f"schedule={self.choices['schedule']}")


def build(cfg: DictConfig, group: str, **extra: Any) -> Any:
    """Instantiate a group; an error of its constructor becomes a UserError."""
    try:
        return instantiate(cfg[group], **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{group}: {str(cause or error).splitlines()[0]}") from error


def _device(name: str) -> torch.device:
    if name != "cpu":
        take_one_gpu()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device; use device=cpu or auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if name == "auto" else name)
