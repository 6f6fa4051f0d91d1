"""Checks of a configuration beyond its types: keys, ranges, and which model fits which data.

`check` needs neither data nor model, so it runs before they are built.
"""

from __future__ import annotations

import inspect
import math
import pydoc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments import schema
from experiments.errors import UserError
from experiments.identity import KINDS, flat
from experiments.usage import CONFIGS, usage

HELP = "python train.py --cfg job shows all keys"

GROUPS = sorted({f.name for f in CONFIGS.iterdir()} & set(schema.Root.__annotations__))
# Keys that each algorithm and schedule of `optim` reads beside the keys of `schema.Optim`.
READ_BY = {
    "sgd": {"momentum"},
    "adam": {"betas"},
    "adamw": {"betas"},
    "drops": {"drops", "warmup_lr"},
    "cosine": {"final_lr"},
}
# Arguments that each kind of data gives to the model (`Data.model_arguments`).
IMAGES, TEXT, PAIRS = {"classes"}, {"vocabulary"}, {"vocabulary", "padding", "labels"}
GIVEN_BY = {
    "images": IMAGES,
    "digits": IMAGES,
    "image_folder": IMAGES,
    "text": TEXT,
    "topics": TEXT,
    "pairs": PAIRS,
    "grammar": PAIRS,
}


@dataclass(frozen=True)
class Range:
    """Allowed values, as a test and in words."""

    test: Callable[[Any], bool]
    words: str
    null: bool = True  # whether null is allowed, if the type allows it

    def includes(self, value: Any) -> bool:
        try:
            return self.test(value)
        except TypeError:  # another type, in a key whose type Hydra does not check
            return False


def whole(least: int, most: float = math.inf) -> Range:
    words = f", at least {least}" if most == math.inf else f" from {least} to {most}"
    return Range(lambda n: type(n) is int and least <= n <= most, f"a whole number{words}")


def number(test: Callable[[float], bool], words: str) -> Range:
    return Range(lambda x: type(x) in (int, float) and math.isfinite(x) and test(x), words)


def one_of(*values: Any) -> Range:
    *others, last = (str(value).lower() for value in values)
    known = {(type(value), value) for value in values}
    return Range(lambda v: (type(v), v) in known, f"{', '.join(others)} or {last}")


def each(item: Range, words: str) -> Range:
    return Range(lambda values: all(map(item.includes, values)), words)


POSITIVE = number(lambda x: x > 0, "a number above 0")
NOT_NEGATIVE = number(lambda x: x >= 0, "a number, at least 0")
BELOW_ONE = number(lambda x: 0 <= x < 1, "a number from 0 to below 1")
FRACTION = number(lambda x: 0 <= x <= 1, "a number from 0 to 1")
BETAS = Range(
    lambda b: len(b) == 2 and all(map(BELOW_ONE.includes, b)), "two numbers from 0 to below 1"
)
DROPS = Range(
    lambda d: all(a < b for a, b in pairwise([0, *d, 1])), "increasing fractions between 0 and 1"
)
GAMMA = Range(
    lambda g: g == "auto" or FRACTION.includes(g), f"{FRACTION.words}, or 'auto'", null=False
)
SWITCH = replace(one_of("auto", True, False), null=False)
# data.train and data.test: a number of rows (grammar) or a folder's name (image_folder).
ROWS = Range(lambda n: type(n) is str or n >= 1, "a whole number, at least 1")

# Methods, schedules and models check their other arguments themselves.
RANGES: dict[str, Range] = {
    "k": whole(0),
    "gamma": GAMMA,
    "seed": whole(0, 2**63 - 1),
    "steps": whole(1),
    "run_root": Range(lambda path: not path.startswith("~"), "a path with $HOME in place of ~"),
    "device": one_of("auto", "cpu", "cuda"),
    "optim.algorithm": one_of("sgd", "adam", "adamw"),
    "optim.schedule": one_of("drops", "cosine"),
    "optim.epochs": POSITIVE,
    "optim.steps": whole(1),
    "optim.batch_size": whole(1),
    "optim.lr": POSITIVE,
    "optim.final_lr": NOT_NEGATIVE,
    "optim.warmup_lr": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.warmup_steps": whole(0),
    "optim.clip": POSITIVE,
    "optim.momentum": BELOW_ONE,
    "optim.betas": BETAS,
    "optim.drops": DROPS,
    **{f"model.{key}": whole(1) for key in ("layers", "hidden", "heads", "length")},
    "model.image_size": whole(1),
    "model.patch_size": whole(1),
    "model.dropout": BELOW_ONE,
    "data.validation": whole(0),
    "data.classes": whole(1),
    "data.train": ROWS,
    "data.test": ROWS,
    "data.length": whole(1),
    "data.vocabulary": whole(1),
    "data.train_limit": whole(1),
    "data.eval_limit": whole(1),
    "data.size": whole(1),
    "data.workers": whole(0),
    "trainer.amp": SWITCH,
    "trainer.channels_last": SWITCH,
    "trainer.progress": SWITCH,
    "trainer.threads": whole(1, 1024),
    "trainer.eval_batch_size": whole(1),
    "trainer.eval_interval": whole(1),
    "trainer.checkpoint_interval": whole(1),
    "trainer.log_interval": whole(1),
    "trainer.snapshots": each(whole(1), "whole numbers, at least 1"),
    "parallel.sizes": each(whole(1), "whole numbers of layers, at least 1"),
    "parallel.data": whole(1),
    "parallel.scan": one_of("auto", "sequential", "doubling", "gathered"),
    "parallel.micro_batches": whole(1),
    "parallel.timeout": whole(1),
    "diagnostics.at": each(FRACTION, "fractions from 0 to 1"),
    "diagnostics.ks": each(whole(0), "whole numbers from 0"),
    "diagnostics.gamma": GAMMA,
    "logger.mode": one_of("offline", "online"),
}


@cache
def register_schema() -> None:
    """Register types and help with Hydra: the root as "schema", the others as "types/<class>"."""
    store = ConfigStore.instance().store
    store(name="schema", node=schema.Root)
    for name, each_type in vars(schema).items():
        if is_dataclass(each_type):
            store(group="types", name=name, node=each_type)
    template = usage().replace("$", "$$")  # Hydra puts its own text in place of $...
    store(group="hydra/help", name="usage", node={"app_name": "train.py", "template": template})


def composed(*overrides: str) -> DictConfig:
    """Return the configuration that train.py composes from these arguments."""
    register_schema()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


def check(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise UserError if no training can run with ``cfg``.

    choices: the choice of each group, by the group's name.
    """
    for name in {f.name for f in fields(schema.Root)} ^ set(cfg):
        raise UserError(f"{name} is {'unknown' if name in cfg else 'missing'}; {HELP}")
    for group in GROUPS:
        if group not in choices:  # no choice, or several
            raise UserError(f"{group} has no choice; expected one of configs/{group}")
        for name in set(cfg[group]) - known_keys(cfg[group]):
            raise UserError(f"{group}.{name} is unknown; {HELP}")
    _check_ranges(dict(flat(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))))
    _check_fit(cfg, choices)


def known_keys(node: DictConfig) -> set[str]:
    """Return the allowed keys of a group: those of its type, and the arguments of its _target_."""
    kind = OmegaConf.get_type(node)
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
    if "algorithm" in node:
        return known.union(*READ_BY.values())
    if "_target_" in node:
        arguments = _signature(node).parameters
        known |= {"_target_", *arguments}
        if any(one.kind is one.VAR_KEYWORD for one in arguments.values()) and kind is dict:
            known |= set(node)
    return known or set(node)


def _signature(node: DictConfig) -> inspect.Signature:
    built_by = pydoc.locate(node._target_)
    if not callable(built_by):
        raise UserError(f"_target_={node._target_}; expected the path of a class or function")
    return inspect.signature(built_by)


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, allowed in RANGES.items():
        value = values.get(key)
        if key in values and not (allowed.includes(value) or (value is None and allowed.null)):
            raise UserError(f"{key}={value}; expected {allowed.words}")
    for key in ("optim.algorithm", "optim.schedule"):
        for name in READ_BY[values[key]] - {k.removeprefix("optim.") for k in values}:
            raise UserError(f"{key}={values[key]} without optim.{name}; expected +optim.{name}=...")
    if all(values[key] is None for key in ("steps", "optim.steps", "optim.epochs")):
        raise UserError("steps, optim.steps and optim.epochs are null; expected one of them")


def _check_fit(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise UserError if the model does not take the data's arguments; skip a user's own data."""
    given = GIVEN_BY.get(KINDS.get(cfg.data._target_))
    if given is None:
        return
    arguments = dict.fromkeys(given.union(set(cfg.model) - {"_target_"}))
    try:
        _signature(cfg.model).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"model={choices['model']} does not fit data={choices['data']}, which gives "
            f"{' and '.join(sorted(given))}: {error}"
        ) from error
