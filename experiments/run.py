"""One run: from a composed configuration to a finished folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.errors import UserError, as_user_error
from experiments.malloc import keep_freed_memory
from experiments.nonfinite import Diverged
from experiments.objective import Objective
from experiments.passes import group_sizes
from experiments.plan import Plan, build
from experiments.provenance import environment
from experiments.run_folder import RunFolder
from experiments.trainer import Trainer
from experiments.wandb_writer import NoWriter


def run(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> Path:
    """Train the run of ``cfg``, resume it, or skip it if it is finished; return the run's folder.

    ``choices`` and ``overrides`` are those of `Plan`.

    Raises:
        UserError: a mistake in the configuration, the data or the disk; or the run diverged,
            which its row records as well.
        BeingTrained: another process is training this run.
        Interrupted: a signal stopped the run after a checkpoint.
    """
    plan = Plan(cfg, choices, overrides)
    with plan.processes.failing_together():
        return _run(plan)


def _run(plan: Plan) -> Path:
    cfg, processes, folder = plan.cfg, plan.processes, plan.folder
    for line in plan.without_effect():
        print(line)
    # Several processes may be on several machines. Rank 0 checks below, after they have met.
    if processes.size == 1:
        if _is_finished(plan, folder):
            return folder.path
        folder.check_idle()
    print(f"{folder.path}: {plan.in_words()}", flush=True)
    processes.meet(plan.device, plan.settings)
    prepare_torch(cfg.trainer)
    torch.manual_seed(cfg.seed)
    data = build(cfg, "data")
    model = plan.model_for(data)
    with as_user_error("grad"):
        hb.set_method(model, plan.method)
    folder.create()
    with processes.enter(folder):
        # another process may have finished it while this one loaded the data
        if not processes.broadcast(_is_finished(plan, folder)):
            beginning = _beginning(folder.path, cfg.continue_from) if processes.writes else None
            _train(plan, folder, Objective(plan, data), model, processes.broadcast(beginning))
    return folder.path


def _is_finished(plan: Plan, folder: RunFolder) -> bool:
    """Whether the run is finished, which is reported."""
    if folder.finished:
        more = plan.cfg.advise or plan.diagnostics.at or plan.cfg.trainer.snapshots
        skipped = ", and with it advice, diagnostics and snapshots" if more else ""
        print(f"{folder.path}: finished already, skipped{skipped}")
    return folder.finished


def prepare_torch(settings: Mapping[str, Any]) -> None:
    """Set threads, memory, and the precision and determinism of CUDA."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    # Not the newer fp32_precision: once it is set, torch.export fails, as it reads allow_tf32.
    torch.backends.cuda.matmul.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.benchmark = not settings["deterministic"]
    torch.use_deterministic_algorithms(settings["deterministic"])
    if settings["deterministic"]:  # cuBLAS needs it before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass
class Beginning:
    """The checkpoint that a run begins with: its own, or if it has none, that of `continue_from`.

    Attributes:
        state: empty if there is no checkpoint.
        line: what to print about the checkpoint.
        source: the folder of `continue_from`, as the user named it; None for a run's own.
    """

    state: dict[str, Any] = field(default_factory=dict)
    line: str | None = None
    source: str | None = None

    @property
    def lasting(self) -> dict[str, Any]:
        """The entries that the run's own checkpoints repeat."""
        if self.source:
            return {"continued_from": f"{self.state['config_hash']} at step {self.state['step']}"}
        return {key: self.state[key] for key in ("continued_from",) if key in self.state}

    def load_into(self, trainer: Trainer) -> None:
        """Load the state; UserError if it does not fit, or another run's has too many steps."""
        place = f"continue_from={self.source}" if self.source else trainer.folder.path
        wrong = f"{place}: its checkpoint is of another model or optimiser, or version"
        with as_user_error(wrong, RuntimeError, LookupError, AttributeError):
            (trainer.start_from if self.source else trainer.restore)(self.state)
        if self.source and trainer.step >= trainer.total_steps:
            raise UserError(
                f"{place} is at step {trainer.step} already; expected less than this run's "
                f"{trainer.total_steps}"
            )


def _beginning(path: Path, elsewhere: str | None) -> Beginning:
    state, line = checkpoint.load(path)
    if state is not None or elsewhere is None:
        return Beginning(state or {}, line)
    try:
        state, line = checkpoint.load(Path(elsewhere))
    except UserError as error:
        raise UserError(
            f"continue_from={elsewhere}: its checkpoints are damaged; expected another run's folder"
        ) from error
    if state is None:
        raise UserError(f"continue_from={elsewhere} has no checkpoint; expected a run's folder")
    return Beginning(state, line, elsewhere)


def _train(
    plan: Plan, folder: RunFolder, objective: Objective, model: nn.Module, beginning: Beginning
) -> None:
    if beginning.line:
        print(beginning.line)
    about = plan.about(objective.data.name, objective.batches.steps_per_epoch, model)
    own = {} if beginning.source else beginning.state
    writer = (build(plan.cfg, "logger") if plan.processes.writes else NoWriter)(
        folder=folder.path,
        config=about["config"],
        about=about,
        run_id=own.get("wandb_id", folder.started().get("wandb_id")),
    )
    folder.start({**about, "wandb_id": writer.run_id})
    row: dict[str, Any] | None = None
    try:
        if own.get("config_hash", plan.hash) != plan.hash:
            raise UserError(
                f"the checkpoint in {folder.path} is of configuration {own['config_hash']}, this "
                f"is {plan.hash}; choose another run_root"
            )
        lasting = {"config_hash": plan.hash, "wandb_id": writer.run_id, **beginning.lasting}
        trainer = Trainer(plan, objective, model, folder, writer.log, lasting)
        diverged = _trained(trainer, beginning)
        row = about | beginning.lasting | _outcome(trainer, diverged)
        folder.finish(row)
    finally:
        writer.finish(row)
    if diverged:
        raise UserError(f"{diverged}; row.json says so") from diverged
    score = f"{row['metric'].removeprefix('eval_')} {row[row['metric']]:.4f}"
    print(f"{folder.path}: {score}, {row['seconds']:.1f} s of training")


def _trained(trainer: Trainer, beginning: Beginning) -> Diverged | None:
    """Train to the end, and save a model of transformers; return Diverged if training diverged."""
    model, folder = trainer.model, trainer.folder
    _report_large_k(trainer)
    if beginning.state:
        beginning.load_into(trainer)
        print(f"{folder.path}: going on after step {trainer.step}")
    if trainer.plan.cfg.advise:
        print(trainer.advice())
    kept = folder.keep_until(trainer.step)
    for record in kept:
        trainer.log(record)  # a process that was killed may not have sent it
    known, recorded = (kept[-1]["step"] if kept else 0), trainer.last.get("step", 0)
    if folder.writes and not beginning.source and known < recorded:
        print(f"{folder.path}: its records of steps {known + 1} to {recorded} are lost")
    try:
        trainer.train()
    except Diverged as diverged:
        return diverged
    if hasattr(model, "save_pretrained"):
        weights = hb.whole_state_dict(model)
        if folder.writes:
            model.save_pretrained(folder.path / "pretrained", weights)
    return None


def _outcome(trainer: Trainer, diverged: Diverged | None) -> dict[str, Any]:
    """Return the fields of a row that are known at the end; scores of a diverged run are None."""
    plan, last, metric = trainer.plan, trainer.last, trainer.objective.task.metric
    sizes = group_sizes(trainer.model, plan.method)
    scores = {key: value for key, value in last.items() if key.startswith("eval_")}
    if not diverged and metric not in scores:
        raise UserError(
            f"{trainer.folder.path}: its checkpoint of the last step lacks {metric}; delete "
            "the folder to start anew"
        )
    if diverged:
        scores = dict.fromkeys({"eval_loss", metric, *scores})
    costs = {key: last.get(key, cost) for key, cost in trainer.costs().items()}
    if isinstance(plan.method, hb.MGRIT):  # each pass runs only a part of the blocks
        costs |= dict.fromkeys(trainer.passes.state_dict())
    return {
        "L": sum(sizes),
        **({"sizes": sizes} if plan.processes.fields else {}),
        "metric": metric,
        "diverged": diverged is not None,
        "last_finite_step": diverged.last_finite_step if diverged else trainer.step,
        "train_loss": last.get("train_loss"),
        **costs,
        **scores,
        **environment(plan.device),
    }


def _report_large_k(trainer: Trainer) -> None:
    """Say before training that k exceeds L; the library would say it in the backward pass."""
    plan = trainer.plan
    L = max((chain.length for chain in hb.chains(trainer.model)), default=0)
    if not L or plan.method.group_size is None:  # a recurrent network's L is its input's length
        return
    L = -(-L // plan.method.group_size)
    if plan.choices["schedule"] == "constant" and getattr(plan.method, "k", 0) > L:
        print(f"k={plan.method.k} is larger than L={L}: exact, but grad=bp is faster")
