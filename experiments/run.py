"""One run: from a composed configuration to a finished folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.config import check_values
from experiments.diagnostics import Diagnostics
from experiments.errors import UserError
from experiments.gpus import take_one_gpu
from experiments.identity import config_hash, identity, precision_of, setup_hash
from experiments.malloc import keep_freed_memory
from experiments.nonfinite import Diverged
from experiments.passes import group_sizes
from experiments.processes import OneProcess, processes_of
from experiments.provenance import environment
from experiments.row import SCHEMA, method_fields, stored_config, stored_overrides
from experiments.run_folder import Bystander, RunFolder
from experiments.trainer import TRAINED, Trainer
from experiments.wandb_writer import NoWriter

FROM_THE_LAST_STEP = (
    "train_loss",
    "seconds",
    "cpu_seconds",
    "block_passes",
    "sequential_passes",
    "peak_memory_mb",
)
# A pass of MGRIT goes through a part of the blocks only, which `Passes` does not count.
PASSES_UNKNOWN = {"block_passes": None, "sequential_passes": None}


def run(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> Path:
    """Train what ``cfg`` says, or go on with it, or find it finished; return the run's folder.

    Args:
        choices: the group choices by name, e.g. {"model": "resnet110", "grad": "highway"}.
        overrides: the arguments ``cfg`` was composed from.

    Raises:
        UserError: a mistake in the configuration, the data or the disk; or the run diverged, which
            its row says as well.
        BeingTrained: another process is at work on this run.
        Interrupted: a signal stopped the run after a checkpoint.
    """
    check_values(cfg)
    processes = processes_of(cfg)
    with processes.together():
        return _run(Plan(cfg, choices, overrides, processes))


@dataclass
class Plan:
    """What is to be run, as far as it is known before data and model are there."""

    cfg: DictConfig
    choices: Mapping[str, str]
    overrides: Sequence[str]
    processes: OneProcess
    method: hb.Method = field(init=False)
    schedule: hb.schedules.Schedule = field(init=False)
    diagnostics: Diagnostics = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.method = build(self.cfg, "grad")
        self.schedule = _schedule(self.cfg, self.choices["schedule"], self.method)
        self.diagnostics = Diagnostics(**OmegaConf.to_container(self.cfg.diagnostics))
        self.device = _device(self.cfg.device)

    @cached_property
    def fields(self) -> dict[str, Any]:
        return identity(self.cfg, self.device.type)

    @property
    def hash(self) -> str:
        return config_hash(self.fields)

    @property
    def folder(self) -> RunFolder:
        name = [self.choices["model"], self.choices["grad"]]
        if self.choices["schedule"] != "constant":
            name.append(self.choices["schedule"])
        elif hasattr(self.method, "k"):
            name.append(f"k{self.method.k}")
        name += [self.hash, self.device.type, f"s{self.cfg.seed}"]
        made = RunFolder if self.processes.writes else Bystander
        return made(
            Path(self.cfg.run_root) / "-".join(name), {**self.fields, "seed": self.cfg.seed}
        )

    def is_finished(self, folder: RunFolder) -> bool:
        """Whether there is nothing to do, which is said."""
        if folder.finished:
            more = self.cfg.advise or self.diagnostics.at
            skipped = ", and with it advice and diagnostics" if more else ""
            print(f"{folder.path}: finished already, skipped{skipped}")
        return folder.finished

    def about(self, data: Any, model: nn.Module) -> dict[str, Any]:
        """What of the run's row is known before it has begun."""
        cfg = self.cfg
        per_epoch = data.train_batches(cfg.optim.batch_size, cfg.seed, "cpu").steps_per_epoch
        steps = cfg.steps or cfg.optim.steps or round(cfg.optim.epochs * per_epoch)
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
            "data": data.name,
            "steps": steps,
            "epochs": steps / per_epoch,
            "batch_size": cfg.optim.batch_size,
            **self.processes.fields,
        }


def _run(plan: Plan) -> Path:
    cfg, processes, folder = plan.cfg, plan.processes, plan.folder
    # Of several processes, which may be on several machines, the first one knows, once they meet.
    if processes.size == 1:
        if plan.is_finished(folder):
            return folder.path
        folder.check_idle()
    processes.meet(plan.device)
    prepare_torch(cfg.trainer)
    torch.manual_seed(cfg.seed)
    data = build(cfg, "data")
    model = build(cfg, "model", **data.model_arguments())
    try:
        hb.set_method(model, plan.method)
    except ValueError as error:
        raise UserError(f"grad: {error}") from error
    folder.create()
    with processes.enter(folder):
        # perhaps by another process, while this one loaded the data
        if processes.known_to_all(plan.is_finished(folder)):
            return folder.path
        beginning = _beginning(folder.path, cfg.continue_from) if processes.writes else None
        state, said = processes.known_to_all(beginning)
        if said:
            print(said)
        return _train(plan, folder, data, model, state or {})


def prepare_torch(settings: Mapping[str, Any]) -> None:
    """Threads, memory, and what CUDA's arithmetic may do."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    precision = "tf32" if settings["tf32"] else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cudnn.benchmark = not settings["deterministic"]
    torch.use_deterministic_algorithms(settings["deterministic"])
    if settings["deterministic"]:  # what cuBLAS asks for, before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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


def _train(plan: Plan, folder: RunFolder, data: Any, model: nn.Module, state: dict) -> Path:
    processes, about = plan.processes, plan.about(data, model)
    continued = {key: state[key] for key in ("continued_from",) if key in state}
    writer = (build(plan.cfg, "logger") if processes.writes else NoWriter)(
        folder=folder.path,
        config=about["config"],
        about=about,
        run_id=state.get("wandb_id", folder.started().get("wandb_id")),
    )
    folder.start({**about, "wandb_id": writer.run_id})
    row: dict[str, Any] | None = None
    diverged: Diverged | None = None
    try:
        _check_same(state, plan.hash, folder.path)
        trainer = Trainer(
            model,
            data,
            folder,
            plan.device,
            plan.cfg.optim,
            plan.cfg.trainer,
            about["steps"],
            plan.cfg.seed,
            plan.schedule,
            plan.diagnostics,
            writer.log,
            {"config_hash": plan.hash, "wandb_id": writer.run_id, **continued},
            processes=processes,
        )
        _tell_large_k(model, plan)
        if "config_hash" in state:
            trainer.restore(state)
        elif state:
            _continue(trainer, state, plan.cfg.continue_from)
        if state:
            print(f"{folder.path}: going on after step {trainer.step}")
        if plan.cfg.advise:
            print(trainer.advice())
        folder.keep_until(trainer.step)
        try:
            trainer.train()
        except Diverged as error:
            diverged = error
        if hasattr(model, "save_pretrained") and not diverged:
            weights = hb.whole_state_dict(model)
            if processes.writes:
                model.save_pretrained(folder.path / "pretrained", weights)
        sizes = group_sizes(model, plan.method)
        row = about | continued | _outcome(trainer, diverged, sizes)
        row |= environment(plan.device) | (PASSES_UNKNOWN if about["grad"] == "mgrit" else {})
        folder.finish(row)
    finally:
        writer.finish(row)
    if diverged:
        raise UserError(f"{diverged}; the row says so") from diverged
    score = f"{row['metric'].removeprefix('eval_')} {row[row['metric']]:.4f}"
    print(f"{folder.path}: {score}, {row['seconds']:.1f} s of training")
    return folder.path


def _outcome(trainer: Trainer, diverged: Diverged | None, sizes: list[int]) -> dict[str, Any]:
    """What of a run's row is known at its end; a run that diverged has no scores."""
    last, metric = trainer.last, trainer.task.metric
    scores = {key: value for key, value in last.items() if key.startswith("eval_")}
    if diverged:
        scores = dict.fromkeys({"eval_loss", metric, *scores})
    return {
        "L": sum(sizes),
        **({"sizes": sizes} if trainer.processes.fields else {}),
        "metric": metric,
        "diverged": diverged is not None,
        "last_finite_step": diverged.last_finite_step if diverged else trainer.step,
        "train_loss": None,
        **trainer.costs(),
        **{key: last[key] for key in FROM_THE_LAST_STEP if key in last},
        **scores,
    }


def build(cfg: DictConfig, group: str, **extra: Any) -> Any:
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


def _tell_large_k(model: nn.Module, plan: Plan) -> None:
    """Say once, before training, what the library would say from inside the backward pass."""
    L = max((chain.length for chain in hb.chains(model)), default=0)
    if not L or plan.method.group_size is None:  # a recurrent network's L is its input's
        return
    L = -(-L // plan.method.group_size)
    if plan.choices["schedule"] == "constant" and getattr(plan.method, "k", 0) > L:
        print(f"k={plan.method.k} is larger than L={L}: exact, but grad=bp is faster")
