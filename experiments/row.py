"""A finished run as one row: the list of its fields, how they are filled, how they are checked."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

import highway_bp as hb
from experiments.errors import UserError
from experiments.identity import KINDS

SCHEMA = 3

# Keys of a configuration that depend on the machine; rows do not have them.
PLACES = ("run_root", "data.root", "data.cache_dir", "logger", "device")


Types = tuple[type, ...]  # that a field's value may have in JSON; True is no whole number
NULL = type(None)
TEXT, NUMBER, WHOLE, YES_NO = (str,), (float, int), (int,), (bool,)
MAYBE_NUMBER = (float, int, NULL)

FIELDS: dict[str, Types] = {
    "schema": WHOLE,  # version of this list
    "config_hash": TEXT,  # of the fields that change the result, experiments/identity.py
    "setup": TEXT,  # the same without gradient method, schedule and carry
    "seed": WHOLE,  # of the weights, batches and augmentation
    "device_kind": TEXT,  # cpu or cuda; with config_hash and seed, a run's key
    "experiment": (str, NULL),  # preset of configs/experiment, null where none was named
    "overrides": (list,),  # arguments of train.py that make the run again, but for the seed
    "config": (dict,),  # the whole configuration, without places on the machine
    "model": TEXT,  # choice of configs/model
    "parameters": WHOLE,  # trained parameters
    "L": WHOLE,  # layers of the longest chain; of a recurrent network, time steps
    "grad": TEXT,  # gradient method: bp, truncated_bptt, fixed_point, mgrit, highway
    "k": (int, NULL),  # iterations; null for methods without, and with a schedule
    "schedule": (str, NULL),  # schedule of k and its numbers; null for one k throughout
    "tolerance": MAYBE_NUMBER,  # change below which iterations stop early
    "gamma": (float, int, str, NULL),  # share of the residual path in the block, or "auto"
    "group_size": (int, NULL),  # layers or time steps that count as one, exact inside
    "window": (int, NULL),  # window of truncated BPTT
    "mgrit": (str, NULL),  # numbers of grad=mgrit, which has no k
    "precision": TEXT,  # float32, tf32 or bfloat16
    "data": TEXT,  # training data, and those it is scored on if others
    "steps": WHOLE,  # training steps
    "epochs": NUMBER,  # training steps by steps per epoch
    "batch_size": WHOLE,  # examples or sequences per step
    "diverged": YES_NO,  # loss or gradient stopped being finite; then there are no scores
    "last_finite_step": WHOLE,  # steps after which both were finite; all, if not diverged
    "metric": TEXT,  # the score that stands for the run: one of the eval_ fields
    "train_loss": MAYBE_NUMBER,  # of the last recorded step, nats
    "eval_loss": MAYBE_NUMBER,  # at the end, nats
    "seconds": NUMBER,  # wall-clock seconds of training steps; no evaluation, no checkpoints
    "cpu_seconds": NUMBER,  # processor seconds of the same, all threads
    "block_passes": (int, NULL),  # passes through all blocks, summed over the steps
    # those that wait for each other when every layer has its own device
    "sequential_passes": (int, NULL),
    "peak_memory_mb": NUMBER,  # of the process, or allocated on the GPU; 1e6 bytes
    "commit": TEXT,  # of this repository
    "dirty": YES_NO,  # tracked files differed from that commit, or it is unknown
    "device": TEXT,  # processor and threads, or GPU
    "python": TEXT,  # version
    "torch": TEXT,  # version
    "versions": (dict,),  # versions of packages that may change a result
}
SCORES: dict[str, Types] = {
    "eval_accuracy": MAYBE_NUMBER,  # right answers / all, 0 to 1
    "eval_perplexity": MAYBE_NUMBER,  # exp of the loss per token
    "eval_bits_per_char": MAYBE_NUMBER,  # loss per character of text, bits
}
SOMETIMES: dict[str, Types] = {
    "continued_from": TEXT,  # config_hash and step of the run this one has gone on from
    "processes": WHOLE,  # of this run; this and the next three with parallel=layers alone
    "sizes": (list,),  # layers of the chain that each process of a replica has
    "replicas": WHOLE,  # of those processes, with a part of every batch each
    "micro_batches": WHOLE,  # parts of a batch that follow one another through the layers
    # in results files: columns over training (train, eval) and, if measured, the gradient's error
    # (gradient_error)
    "curve": (dict,),
}


def method_fields(cfg: DictConfig, schedule: str, method: hb.Method) -> dict[str, Any]:
    """Return the fields of a row that describe its gradient method and its schedule."""
    changes = schedule != "constant"
    numbers, settings = OmegaConf.to_container(cfg.schedule, resolve=True), vars(method)
    return {
        "grad": KINDS.get(cfg.grad._target_, cfg.grad._target_),
        "k": None if changes else settings.get("k"),
        "schedule": f"{schedule} {_in_words(numbers)}".rstrip() if changes else None,
        "mgrit": _in_words(asdict(method)) if isinstance(method, hb.MGRIT) else None,
        **{n: settings.get(n) for n in ("tolerance", "gamma", "group_size", "window")},
    }


def method_name(row: Mapping[str, Any]) -> str:
    """For instance "bp", "highway k=3", "highway gamma=0.2 k=3", "highway adaptive ks=[1, 2]"."""
    numbers = {name: row[name] for name in ("gamma", "group_size", "window", "tolerance")}
    if numbers["group_size"] == 1:
        numbers["group_size"] = None
    shown = [f"{name}={number}" for name, number in numbers.items() if number]
    shown += [row["mgrit"]] if row["mgrit"] else []
    k = [] if row["k"] is None else [f"k={row['k']}"]
    return " ".join([row["grad"], *shown, *([row["schedule"]] if row["schedule"] else k)])


def _in_words(values: Mapping[str, Any]) -> str:
    """Settings on one line, for instance "n=10 first=bp"."""
    return " ".join(
        f"{key}={str(value).replace(chr(39), '')}"
        for key, value in values.items()
        if key != "_target_"
    )


def stored_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without `PLACES`."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for place in PLACES:
        group, _, key = place.rpartition(".")
        (config[group] if group else config).pop(key, None)
    return config


def stored_overrides(overrides: Iterable[str]) -> list[str]:
    """Return the arguments on which a run's result depends, without those for machine and seed."""
    beside = (*PLACES, "seed", "hydra", "trainer.threads", "trainer.progress")
    return [o for o in overrides if not o.lstrip("+~").startswith(beside)]


def command(row: Mapping[str, Any]) -> str:
    """Return the command that makes a row again, from the root of the repository."""
    arguments = [*row["overrides"], f"seed={row['seed']}", f"device={row['device_kind']}"]
    return shlex.join(["python", "train.py", *arguments])


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return what identifies a run."""
    return row["config_hash"], row["device_kind"], row["seed"]


def check_row(row: Any, where: str) -> None:
    """Check a row. Fields of SCORES and SOMETIMES may be missing, except the row's own metric.

    The UserError names ``where``, and the fields that are missing, unknown or of a wrong type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a row; expected a JSON object")
    if row.get("schema") != SCHEMA:
        raise UserError(
            f"{where} is of schema {row.get('schema', 1)}, expected {SCHEMA}; make it again"
        )
    known = FIELDS | SCORES | SOMETIMES
    complaints = [f"{name} is missing" for name in FIELDS if name not in row]
    complaints += [f"{name} is unknown" for name in row if name not in known]
    complaints += [
        f"{name} is {row[name]!r}, expected {_in_json(types)}"
        for name, types in known.items()
        if name in row and (type(row[name]) not in types or row[name] != row[name])  # nan
    ]
    if not complaints and row["steps"] < 1:
        complaints = [f"steps is {row['steps']}, expected at least 1"]
    if not complaints and row["metric"] not in row.keys() & SCORES.keys():
        complaints = [f"metric is {row['metric']!r}, expected the name of a score in the row"]
    if not complaints and (row[row["metric"]] is None) != row["diverged"]:
        complaints = [f"{row['metric']} is {row[row['metric']]} and diverged {row['diverged']}"]
    if complaints:
        raise UserError(f"{where}: {'; '.join(complaints)}")


def _in_json(types: Types) -> str:
    return " or ".join("null" if kind is NULL else kind.__name__ for kind in types)
