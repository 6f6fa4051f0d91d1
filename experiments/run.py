"""One run: from a composed configuration to a finished folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import highway_bp as hb
from experiments import checkpoint
from experiments.config import check_values, config_hash, identity, setup_hash
from experiments.diagnostics import Diagnostics
from experiments.errors import UserError
from experiments.gpus import take_one_gpu
from experiments.malloc import keep_freed_memory
from experiments.passes import group_sizes
from experiments.processes import OneProcess, processes_of
from experiments.provenance import environment
from experiments.row import SCHEMA
from experiments.run_folder import Bystander, RunFolder
from experiments.trainer import TRAINED, Trainer
from experiments.wandb_writer import NoWriter

GRAD_NAMES = {
    hb.Backprop: "bp",
    hb.FixedPoint: "fixed_point",
    hb.Highway: "highway",
    hb.TruncatedBPTT: "truncated_bptt",
    hb.MGRIT: "mgrit",
}


FROM_THE_LAST_STEP = (
    "train_loss",
    "seconds",
    "cpu_seconds",
    "block_passes",
    "sequential_passes",
    "peak_memory_mb",
)
CONTINUED = ("continued_from",)
# A pass of MGRIT goes through a part of the blocks only, which `Passes` does not count.
PASSES_UNKNOWN = {"block_passes": None, "sequential_passes": None}


def run(cfg: DictConfig, choices: Mapping[str, str]) -> Path:
    """Train what ``cfg`` says, or go on with it, or find it finished; return the run's folder.

    Args:
        choices: the group choices by name, e.g. {"model": "resnet110", "grad": "highway"}.

    Raises:
        UserError: a mistake in the configuration, the data or the disk.
        BeingTrained: another process is at work on this run.
        Interrupted: a signal stopped the run after a checkpoint.
    """
    check_values(cfg)
    processes = processes_of(cfg)
    with processes.together():
        return _run(cfg, choices, processes)


def _run(cfg: DictConfig, choices: Mapping[str, str], processes: OneProcess) -> Path:
    method = _build(cfg, "grad")
    schedule = _schedule(cfg, choices["schedule"], method)
    diagnostics = Diagnostics(**OmegaConf.to_container(cfg.diagnostics))
    name, config = _run_name(cfg, choices, method)
    folder = (RunFolder if processes.writes else Bystander)(
        Path(cfg.run_root) / name, {**config, "seed": cfg.seed}
    )
    more = ", and with it advice and diagnostics" if cfg.advise or diagnostics.at else ""
    # Of several processes, which may be on several machines, the first one knows, once they meet.
    if processes.size == 1:
        if _finished(folder, more):
            return folder.path
        folder.check_idle()
    device = _device(cfg.device)
    processes.meet(device)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    keep_freed_memory()
    torch.manual_seed(cfg.seed)
    data = _build(cfg, "data")
    model = _build(cfg, "model", **data.model_arguments())
    try:
        hb.set_method(model, method)
    except ValueError as error:
        raise UserError(f"grad: {error}") from error
    folder.create()
    with processes.enter(folder):
        # perhaps by another process, while this one loaded the data
        if processes.known_to_all(_finished(folder, more)):
            return folder.path
        beginning = _beginning(folder.path, cfg.continue_from) if processes.writes else None
        state, said = processes.known_to_all(beginning)
        if said:
            print(said)
        return _train(
            cfg,
            choices,
            config,
            folder,
            device,
            data,
            model,
            method,
            schedule,
            diagnostics,
            state,
            processes,
        )


def _finished(folder: RunFolder, more: str) -> bool:
    if folder.finished:
        print(f"{folder.path}: finished already, skipped{more}")
    return folder.finished


def _beginning(path: Path, elsewhere: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """The run's own checkpoint, or at first that of the run it is to go on from; what to say."""
    state, said = checkpoint.load(path)
    if state is not None or elsewhere is None:
        return state, said
    state, said = checkpoint.load(Path(elsewhere))
    if state is None:
        raise UserError(f"continue_from={elsewhere} has no checkpoint; expected a run's folder")
    mark = f"{state['config_hash']} at step {state['step']}"
    return {"continued_from": mark, **{key: state[key] for key in TRAINED}}, said


def _train(
    cfg,
    choices,
    config,
    folder,
    device,
    data,
    model,
    method,
    schedule,
    diagnostics,
    state,
    processes,
) -> Path:
    about = _about(cfg, choices, config, data, model, method) | processes.fields
    digest, steps = about["config_hash"], about["steps"]
    state = state or {}
    wandb_id = state.get("wandb_id", folder.started().get("wandb_id"))
    writer = (_build(cfg, "logger") if processes.writes else NoWriter)(
        folder=folder.path, config=config, about=about, run_id=wandb_id
    )
    folder.start({**about, "wandb_id": writer.run_id})
    row: dict[str, Any] | None = None
    try:
        _check_same(state, digest, folder.path)
        trainer = Trainer(
            model,
            data,
            folder,
            device,
            cfg.optim,
            cfg.trainer,
            steps,
            cfg.seed,
            schedule,
            diagnostics,
            writer.log,
            {
                "config_hash": digest,
                "wandb_id": writer.run_id,
                **{key: state[key] for key in CONTINUED if key in state},
            },
            processes=processes,
            sizes=state.get("sizes"),  # older ones have none
        )
        _tell_large_k(model, method, choices["schedule"])
        if "config_hash" in state:
            trainer.restore(state)
        elif state:
            _continue(trainer, state, cfg.continue_from)
        if state:
            print(f"{folder.path}: going on after step {trainer.step}")
        if cfg.advise:
            print(trainer.advice())
        folder.keep_until(trainer.step)
        scores = trainer.train()
        if hasattr(model, "save_pretrained"):
            weights = processes.model_state(model)
            if processes.writes:
                model.save_pretrained(folder.path / "pretrained", weights)
        sizes = group_sizes(model, method)
        row = {
            "schema": SCHEMA,
            **about,
            **({"sizes": sizes} if processes.fields else {}),
            **{key: state[key] for key in CONTINUED if key in state},
            "L": sum(sizes),
            "metric": trainer.task.metric,
            **environment(device),
            **{key: score for key, score in scores.items() if key.startswith("eval_")},
            **{key: scores[key] for key in FROM_THE_LAST_STEP},
            **(PASSES_UNKNOWN if about["grad"] == "mgrit" else {}),
            "seconds_per_step": scores["seconds"] / steps,
        }
        folder.finish(row)
    finally:
        writer.finish(row)
    score = f"{row['metric'].removeprefix('eval_')} {row[row['metric']]:.4f}"
    print(f"{folder.path}: {score}, {row['seconds']:.1f} s of training")
    return folder.path


def _about(
    cfg: DictConfig,
    choices: Mapping[str, str],
    config: dict[str, Any],
    data: Any,
    model: torch.nn.Module,
    method: hb.Method,
) -> dict[str, Any]:
    """What of a run's row is known before it has begun."""
    per_epoch = data.train_batches(cfg.optim.batch_size, cfg.seed, "cpu").steps_per_epoch
    full = cfg.optim.steps or round(cfg.optim.epochs * per_epoch)  # the recipe's
    steps = cfg.steps or full
    changes = choices["schedule"] != "constant"
    return {
        "experiment": choices.get("experiment"),
        "model": choices["model"],
        "grad": GRAD_NAMES[type(method)],
        "k": None if changes else getattr(method, "k", None),
        "schedule": _described(cfg, choices["schedule"]) if changes else None,
        "tolerance": getattr(method, "tolerance", None),
        "gamma": getattr(method, "gamma", None),
        "group_size": getattr(method, "group_size", None),
        "window": getattr(method, "window", None),
        **({"mgrit": _numbers(asdict(method))} if isinstance(method, hb.MGRIT) else {}),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "data": data.name,
        "validation": cfg.data.get("validation"),
        "steps": steps,
        "epochs": steps / per_epoch,
        "batch_size": cfg.optim.batch_size,
        "lr": cfg.optim.lr,
        "seed": cfg.seed,
        "config_hash": config_hash(config),
        "setup": setup_hash(config),
        "reduced": steps < full,
    }


def _build(cfg: DictConfig, group: str, **extra: Any) -> Any:
    """Instantiate a group; what its constructor rejects is the user's to mend."""
    try:
        return instantiate(cfg[group], **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{group}: {str(cause or error).splitlines()[0]}") from error


def _schedule(cfg: DictConfig, name: str, method: hb.Method) -> hb.schedules.Schedule:
    """The schedule around ``method``; built before anything is loaded, so that it fails early."""
    try:
        schedule = instantiate(cfg.schedule, _partial_=True, _convert_="all")(method)
        if cfg.steps:
            schedule.method_for(0, cfg.steps)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule={name}: {error}") from error
    return schedule


def _described(cfg: DictConfig, name: str) -> str:
    """A schedule in a word and its numbers, for instance "bp_every n=10"."""
    values = OmegaConf.to_container(cfg.schedule, resolve=True)
    return f"{name} {_numbers(values)}".rstrip()


def _numbers(values: Mapping[str, Any]) -> str:
    """Settings on one line, for instance "n=10 first=bp"."""
    return " ".join(
        f"{key}={str(value).replace(chr(39), '')}"
        for key, value in values.items()
        if key != "_target_"
    )


def _run_name(cfg: DictConfig, choices: Mapping[str, str], method: hb.Method):
    config = identity(cfg)
    k = f"-k{method.k}" if hasattr(method, "k") else ""
    if choices["schedule"] != "constant":
        k = f"-{choices['schedule']}"
    grad = choices["grad"]
    return f"{choices['model']}-{grad}{k}-{config_hash(config)}-s{cfg.seed}", config


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}; expected auto, cpu or cuda")
    if name != "cpu":
        take_one_gpu()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device; use device=cpu or auto")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if name == "auto" else name)


def _continue(trainer: Trainer, state: dict[str, Any], elsewhere: str) -> None:
    """Begin with another run's ``state``."""
    try:
        trainer.begin_with(state)
    except (RuntimeError, ValueError) as error:
        first = " ".join(" ".join(str(error).splitlines()[:2]).split())  # of many, perhaps
        raise UserError(
            f"continue_from={elsewhere}: its checkpoint is of another model or "
            f"optimiser ({first[:300]})"
        ) from error
    if trainer.step >= trainer.total_steps:
        raise UserError(
            f"continue_from={elsewhere} has come to step {trainer.step}; expected "
            f"less than this run's {trainer.total_steps}"
        )


def _check_same(state: dict[str, Any], digest: str, path: Path) -> None:
    if state.get("config_hash", digest) != digest:
        raise UserError(
            f"the checkpoint in {path} is of configuration {state['config_hash']}, this is "
            f"{digest}; choose another run_root"
        )


def _tell_large_k(model: torch.nn.Module, method: hb.Method, schedule: str) -> None:
    """Say once, before training, what the library would say from inside the backward pass."""
    L = max((chain.length for chain in hb.chains(model)), default=0)
    groups = method.groups(L) if L else None  # a recurrent network's L is its input's
    if groups is None:
        return
    if schedule == "constant" and getattr(method, "k", 0) > len(groups):
        print(f"k={method.k} is larger than L={len(groups)}: exact, but grad=bp is faster")
    warnings.filterwarnings("ignore", message=r"k=\d+ is larger than L=")
