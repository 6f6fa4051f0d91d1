"""What a configuration may hold: its keys, and the values that each key allows.

`check` needs neither data nor model, so it runs before they are built.
"""

import inspect
import math
import pydoc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CONFIGS, GROUPS, usage
from experiments.errors import UserError
from experiments.identity import KINDS, flat

HELP = "python train.py --cfg job shows all keys"

# Groups whose choice is a part of the configuration, and must be made.
CHOSEN = [group for group in GROUPS if group not in ("experiment", "hydra/launcher")]
# The length of training; the first of these that is set counts.
LENGTHS = ("steps", "optim.steps", "optim.epochs")
LARGEST = 2**63 - 1  # torch takes no larger whole number
# Keys that each algorithm and schedule of `optim` reads beside those that all read.
READ_BY = {
    "sgd": {"momentum"},
    "adam": {"betas"},
    "adamw": {"betas"},
    "drops": {"drops", "warmup_lr"},
    "cosine": {"final_lr"},
}


@dataclass(frozen=True)
class Range:
    """Allowed values, as a test and in words."""

    test: Callable[[Any], bool]
    words: str

    def includes(self, value: Any) -> bool:
        try:
            return self.test(value)
        except (TypeError, AttributeError):  # another type
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
    return Range(lambda values: type(values) is list and all(map(item.includes, values)), words)


def or_null(other: Range) -> Range:
    return Range(lambda value: value is None or other.includes(value), f"{other.words}, or null")


TEXT = Range(lambda value: type(value) is str, "text")
YES_NO = one_of(True, False)
SWITCH = one_of("auto", True, False)
POSITIVE = number(lambda x: x > 0, "a number above 0")
NOT_NEGATIVE = number(lambda x: x >= 0, "a number, at least 0")
BELOW_ONE = number(lambda x: 0 <= x < 1, "a number from 0 to below 1")
FRACTION = number(lambda x: 0 <= x <= 1, "a number from 0 to 1")
BETAS = Range(
    lambda b: type(b) is list and len(b) == 2 and all(map(BELOW_ONE.includes, b)),
    "two numbers from 0 to below 1",
)
DROPS = Range(
    lambda d: type(d) is list and all(a < b for a, b in pairwise([0, *d, 1])),
    "increasing fractions between 0 and 1",
)
GAMMA = Range(lambda g: g == "auto" or FRACTION.includes(g), f"{FRACTION.words}, or 'auto'")
PLACE = Range(lambda path: TEXT.includes(path) and path, "a path")
PART = Range(
    lambda part: (
        {"name", "config", "split"} <= part.keys() <= {"name", "config", "split", "rows"}
        and all(map(TEXT.includes, (part["name"], part["split"])))
    ),
    "a part of a hub data set, {name: NAME, config: null, split: train}",
)
# Of data.train and data.test, by the kind of data.
SPLITS = {"grammar": whole(1), "image_folder": TEXT, "text": PART, "pairs": PART}

# All keys of the root and of the groups without _target_. Of the others, those whose values
# neither the method, the schedule nor the model checks.
RANGES: dict[str, Range] = {
    "k": whole(0),
    "gamma": GAMMA,
    "seed": whole(0, LARGEST),
    "steps": or_null(whole(1)),
    "advise": YES_NO,
    "continue_from": or_null(PLACE),
    "run_root": Range(
        lambda path: path and not path.startswith("~"), "a path, with $HOME in place of ~"
    ),
    "device": one_of("auto", "cpu", "cuda"),
    "optim.algorithm": one_of("sgd", "adam", "adamw"),
    "optim.schedule": one_of("drops", "cosine"),
    "optim.epochs": or_null(POSITIVE),
    "optim.steps": or_null(whole(1)),
    "optim.batch_size": whole(1),
    "optim.lr": POSITIVE,
    "optim.final_lr": NOT_NEGATIVE,
    "optim.warmup_lr": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.warmup_steps": whole(0),
    "optim.clip": or_null(POSITIVE),
    "optim.momentum": BELOW_ONE,
    "optim.betas": BETAS,
    "optim.drops": DROPS,
    "trainer.amp": SWITCH,
    "trainer.tf32": YES_NO,
    "trainer.channels_last": SWITCH,
    "trainer.deterministic": YES_NO,
    "trainer.cuda_graph": YES_NO,
    "trainer.progress": SWITCH,
    "trainer.threads": or_null(whole(1, 1024)),
    "trainer.eval_batch_size": whole(1),
    "trainer.eval_interval": or_null(whole(1)),
    "trainer.checkpoint_interval": or_null(whole(1)),
    "trainer.log_interval": whole(1),
    "trainer.snapshots": each(whole(1), "whole numbers, at least 1"),
    "parallel.layers": YES_NO,
    "parallel.sizes": or_null(each(whole(1), "whole numbers of layers, at least 1")),
    "parallel.data": whole(1),
    "parallel.scan": one_of("auto", "sequential", "doubling", "gathered"),
    "parallel.micro_batches": whole(1),
    "parallel.timeout": whole(1),
    "diagnostics.at": each(FRACTION, "fractions from 0 to 1"),
    "diagnostics.ks": each(whole(0), "whole numbers from 0"),
    "diagnostics.gamma": GAMMA,
    **{f"model.{key}": whole(1) for key in ("layers", "hidden", "heads", "length")},
    **{f"model.{key}": whole(1) for key in ("image_size", "patch_size")},
    "model.dropout": BELOW_ONE,
    "model.preact": YES_NO,
    "model.pretrained": or_null(Range(PLACE.test, "a folder, hub name or package:NAME/FOLDER")),
    **{f"data.{key}": YES_NO for key in ("augment", "flip")},
    **{f"data.{key}": whole(0) for key in ("validation", "workers")},
    **{f"data.{key}": whole(1) for key in ("classes", "length", "vocabulary", "size")},
    **{f"data.{key}": or_null(whole(1)) for key in ("train_limit", "eval_limit")},
    "data.rows": or_null(
        Range(
            lambda rows: all(map(whole(1).includes, rows.values())),
            "a number of rows for each split, {train: 9}",
        )
    ),
    **{f"data.{key}": TEXT for key in ("name", "tokenizer", "image_column", "label_column")},
    **{f"data.{key}": or_null(TEXT) for key in ("config", "root", "cache_dir")},
    "data.splits": Range(
        lambda names: type(names) is list and len(names) == 2 and all(map(TEXT.includes, names)),
        "the names of two splits",
    ),
    "logger.mode": one_of("offline", "online"),
    "logger.project": TEXT,
    **{f"logger.{key}": or_null(TEXT) for key in ("entity", "group")},
}


@cache
def register_help() -> None:
    """Register the text of --help with Hydra."""
    template = usage().replace("$", "$$")  # Hydra puts its own text in place of $...
    node = {"app_name": "train.py", "template": template}
    ConfigStore.instance().store(group="hydra/help", name="usage", node=node)


def composed(*overrides: str) -> DictConfig:
    """Return the configuration that train.py composes from these arguments."""
    register_help()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


def check(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise UserError if no training can run with ``cfg``.

    choices: the choice of each group, by the group's name.
    """
    for group in CHOSEN:
        if group not in cfg or group not in choices:  # no choice, or several
            raise UserError(f"{group} has no choice; expected one of configs/{group}")
    values = dict(flat(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    for key, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and abs(one) > LARGEST:
                raise UserError(f"{key}={value}; expected numbers up to {LARGEST}")
    split = SPLITS.get(KINDS.get(values.get("data._target_")))
    of_data = {f"data.{key}": split for key in ("train", "test") if split}
    for key, allowed in (RANGES | of_data).items():
        value = values[key] if key in values else OmegaConf.select(cfg, key)  # None or a mapping
        if (key in values or value is not None) and not allowed.includes(value):
            raise UserError(f"{key}={value}; expected {allowed.words}")
    # Last, as it imports what the groups build, and with it torch.
    for group in CHOSEN:
        for name in set(cfg[group]) - known_keys(cfg, group):
            raise UserError(f"{group}.{name} is unknown; {HELP}")
    for name in set(cfg) - {*CHOSEN, *RANGES}:
        raise UserError(f"{name} is unknown; {HELP}")
    _check_missing(values, signature(cfg.logger).parameters)
    lengths = [values.get(f"{group}.length") for group in ("model", "data")]
    if None not in lengths and lengths[0] < lengths[1] and not values.get("model.pretrained"):
        raise UserError(f"model.length={lengths[0]}; expected at least data.length={lengths[1]}")


def known_keys(cfg: DictConfig, group: str) -> set[str]:
    """Return the allowed keys of a group; of one with a _target_, the arguments it takes."""
    if "_target_" not in cfg[group]:
        return {key.partition(".")[2] for key in RANGES if key.startswith(f"{group}.")}
    arguments = signature(cfg[group]).parameters
    anything = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    return {"_target_", "_partial_", *(cfg[group] if anything else arguments)}


def signature(node: DictConfig) -> inspect.Signature:
    """Return the signature of what a group with a _target_ builds."""
    built_by = pydoc.locate(str(node._target_))
    if not callable(built_by):
        raise UserError(f"_target_={node._target_}; expected the path of a class or function")
    return inspect.signature(built_by)


def _check_missing(values: Mapping[str, Any], of_logger: Iterable[str]) -> None:
    sometimes = {f"optim.{name}" for names in READ_BY.values() for name in names}
    always = {"parallel.layers", *(f"logger.{name}" for name in of_logger)}
    for key in sorted(RANGES.keys() - sometimes - values.keys()):
        if key in always or key.rpartition(".")[0] in ("", "optim", "trainer", "diagnostics"):
            raise UserError(f"{key} is missing; {HELP}")
    if values["parallel.layers"] and "parallel.data" not in values:
        raise UserError("parallel.layers=true without parallel.data; expected parallel=layers")
    for key in ("optim.algorithm", "optim.schedule"):
        for name in READ_BY[values[key]]:
            if f"optim.{name}" not in values:
                given = f"{key}={values[key]} without optim.{name}"
                raise UserError(f"{given}; expected +optim.{name}=...")
    if all(values[key] is None for key in LENGTHS):
        raise UserError("steps, optim.steps and optim.epochs are null; expected one of them")
