"""One run: from a composed configuration to a finished folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

import highway_bp as hb
from experiments import checkpoint
from experiments.devices import prepare_torch
from experiments.errors import BeingTrained, UserError, as_user_error
from experiments.nonfinite import Diverged
from experiments.objective import Objective
from experiments.passes import group_sizes
from experiments.plan import Plan, build
from experiments.provenance import environment
from experiments.run_folder import RunFolder, is_busy
from experiments.trainer import Trainer
from experiments.wandb_writer import NoWriter


def run(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> Path:
    """Train the run of ``cfg``, resume it, or skip it if it is finished; return the run's folder.

    ``choices`` and ``overrides`` are those of `Plan`.

    Raises:
        UserError: a mistake, or the run diverged, which its row records as well.
        BeingTrained: another process is training this run.
        Interrupted: a signal stopped the run after a checkpoint.
    """
    plan = Plan(cfg, choices, overrides)
    with plan.processes.report_lost_process():
        return _run(plan)


def _run(plan: Plan) -> Path:
    cfg, processes, folder = plan.cfg, plan.processes, plan.folder
    for line in plan.without_effect():
        print(line)
    # Several processes may be on several machines. Rank 0 checks below, after they have met.
    if processes.size == 1:
        if _is_finished(plan, folder):
            return folder.path
        if is_busy(folder.path):
            raise BeingTrained(folder.path)
    print(f"{folder.path}: {plan.in_words()}", flush=True)
    processes.connect(plan.device, plan.settings)
    if processes.writes:
        _check_source(cfg.continue_from, folder)
    prepare_torch(cfg.trainer)
    torch.manual_seed(cfg.seed)
    data = build(cfg, "data")
    model = plan.model_for(data)
    with as_user_error("grad"):
        hb.set_method(model, plan.method)
    folder.create(plan.fields | {"seed": cfg.seed})
    with folder.locked() as free:
        if not processes.broadcast(free):
            raise BeingTrained(folder.path)
        # another process may have finished it while this one loaded the data
        if not processes.broadcast(_is_finished(plan, folder)):
            objective = Objective(cfg, data, plan.device, processes)
            _train(plan, folder, objective, model)
    return folder.path


def _is_finished(plan: Plan, folder: RunFolder) -> bool:
    """Whether the run is finished, which is reported."""
    if folder.finished:
        more = plan.cfg.advise or plan.cfg.diagnostics.at or plan.cfg.trainer.snapshots
        skipped = ", and with it advice, diagnostics and snapshots" if more else ""
        diverged = "; it diverged" if folder.row.get("diverged") else ""
        print(f"{folder.path}: finished already, skipped{skipped}{diverged}")
    return folder.finished


def _check_source(source: str | None, folder: RunFolder) -> None:
    """Raise UserError, before data are loaded, if the run is to begin with a missing checkpoint."""
    if source and not (checkpoint.files(folder.path) or checkpoint.files(Path(source))):
        raise UserError(f"continue_from={source} has no checkpoint; expected a run's folder")


def _beginning(plan: Plan, folder: RunFolder, steps: int) -> dict[str, Any]:
    """Return the checkpoint that the run begins with: its own, else that of `continue_from`, or {}.

    steps: of the whole run.
    """
    state = checkpoint.load(folder.path)
    if state is None:
        source = plan.cfg.continue_from
        return _state_to_continue(source, steps) if source else {}
    if state["config_hash"] != plan.hash:
        raise UserError(
            f"the checkpoint in {folder.path} is of configuration {state['config_hash']}, this "
            f"is {plan.hash}; choose another run_root"
        )
    return state


def _state_to_continue(source: str, steps: int) -> dict[str, Any]:
    """Return another run's checkpoint without what is that run's alone.

    The state of method and schedule is left out, because gammas and errors differ in other groups.
    """
    try:
        state = checkpoint.load(Path(source))
    except UserError as error:
        raise UserError(
            f"continue_from={source}: its checkpoints are damaged; expected another run's folder"
        ) from error
    if state["step"] >= steps:
        raise UserError(
            f"continue_from={source} is at step {state['step']} already; expected less than this "
            f"run's {steps}"
        )
    own = {"method", "schedule", "last"}
    continued = f"{state['config_hash']} at step {state['step']}"
    return {k: v for k, v in state.items() if k not in own} | {"continued_from": continued}


def _train(plan: Plan, folder: RunFolder, objective: Objective, model: nn.Module) -> None:
    per_epoch, processes = objective.batches.steps_per_epoch, plan.processes
    about = plan.about(objective.data.name, per_epoch, model)
    beginning = processes.broadcast(
        _beginning(plan, folder, about["steps"]) if processes.writes else None
    )
    continued = {key: value for key, value in beginning.items() if key == "continued_from"}
    lasting = {"config_hash": plan.hash, **continued}
    writer = (build(plan.cfg, "logger") if processes.writes else NoWriter)(
        folder=folder.path, about=about, run_id=folder.started().get("wandb_id")
    )
    folder.start({**about, "wandb_id": writer.run_id})
    row: dict[str, Any] | None = None
    try:
        trainer = Trainer(plan, objective, model, folder, writer.log, lasting)
        diverged = _trained(trainer, beginning)
        row = about | lasting | _outcome(trainer, diverged)
        folder.finish(row)
    finally:
        writer.finish(row)
    if diverged:
        raise UserError(f"{diverged}; row.json says so") from diverged
    score = f"{row['metric'].removeprefix('eval_')} {row[row['metric']]:.4f}"
    print(f"{folder.path}: {score}, {row['seconds']:.1f} s of training")


def _trained(trainer: Trainer, beginning: dict[str, Any]) -> Diverged | None:
    """Train to the end, and save a model of transformers; return Diverged if training diverged."""
    model, folder, plan = trainer.model, trainer.folder, trainer.plan
    _report_large_k(plan, model)
    if beginning:
        # Another run's checkpoint comes without "method".
        place = folder.path if "method" in beginning else f"continue_from={plan.cfg.continue_from}"
        wrong = f"{place}: its checkpoint is of another model or optimiser, or version"
        with as_user_error(wrong, RuntimeError, LookupError, AttributeError):
            trainer.restore(beginning)
        print(f"{folder.path}: going on after step {trainer.step}")
    if plan.cfg.advise:
        print(trainer.advice())
    kept = folder.keep_until(trainer.step)
    for record in kept:
        trainer.log(record)  # a process that was killed may not have sent it
    known = kept[-1]["step"] if kept else 0
    recorded = trainer.last.get("step", 0)  # by the checkpoint
    if folder.writes and known < recorded:
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
    if diverged:
        scores = dict.fromkeys({"eval_loss", metric, *scores})
    # As last recorded: a process that only finishes a run knows its own peak memory alone.
    costs = {key: last.get(key, cost) for key, cost in trainer.costs().items()}
    if isinstance(plan.method, hb.MGRIT):  # each pass runs only a part of the blocks
        costs |= dict.fromkeys(asdict(trainer.passes))
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


def _report_large_k(plan: Plan, model: nn.Module) -> None:
    """Say before training that k exceeds L, in groups; a recurrent network's L is not known yet."""
    if plan.choices["schedule"] == "constant" and hasattr(plan.method, "k"):
        L = len(group_sizes(model, plan.method))
        if 0 < L < plan.method.k:
            print(f"k={plan.method.k} is larger than L={L}: exact, but grad=bp is faster")
