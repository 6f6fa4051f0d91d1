"""The training loop: steps, evaluation, checkpoints, and stopping in good order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import highway_bp as hb
from experiments import checkpoint
from experiments.atomic import write_atomically
from experiments.data.images import ImageData
from experiments.data.text import TextData
from experiments.diagnostics import Diagnostics, flat
from experiments.errors import UserError
from experiments.interrupt import Interrupted, StopSignal
from experiments.nonfinite import first_nonfinite_gradient, first_nonfinite_output
from experiments.optimizer import build_optimizer, learning_rate
from experiments.passes import Passes
from experiments.processes import OneProcess
from experiments.provenance import peak_memory_mb
from experiments.run_folder import RunFolder

# Of a checkpoint, what has nothing to do with the gradient method.
TRAINED = (
    "model",
    "optimizer",
    "step",
    "last",
    "seconds",
    "cpu_seconds",
    "passes",
    "rng",
    "cuda_rng",
)


@dataclass
class Trainer:
    """Trains a model for ``total_steps``, from its last checkpoint if there is one.

    Args:
        optim, settings: the config groups ``optim`` and ``trainer``.
        schedule: gives the gradient method of every step.
        diagnostics: when the gradient's error is measured.
        processes: those that train the model together; the first of them writes.
        log: the second writer's ``log(record, step)``.
        extra_state: what else the checkpoint carries (config hash, wandb id).
        sizes: layers per process, as the checkpoint to be restored has them.
    """

    model: nn.Module
    data: ImageData | TextData
    folder: RunFolder
    device: torch.device
    optim: Mapping[str, Any]
    settings: Mapping[str, Any]
    total_steps: int
    seed: int
    schedule: hb.schedules.Schedule
    diagnostics: Diagnostics
    log: Callable[[dict[str, Any], int], None]
    extra_state: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process: more with threads, less on a shared processor
    passes: Passes = field(default_factory=Passes)
    processes: OneProcess = field(default_factory=OneProcess)
    sizes: list[int] | None = None
    last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task = self.data.task
        self.batches = self.data.train_batches(self.optim["batch_size"], self.seed, self.device)
        self.model.to(self.device)
        if self.settings["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        self.amp = self.settings["amp"] and self.device.type == "cuda"
        self.processes.share(
            self.model, lambda model: self._loss_of(*self._batch(0))(model), self.sizes
        )
        self.trained = self.processes.replicated(self.model)
        self.optimizer = build_optimizer(self.model, self.optim)
        per_epoch = self.batches.steps_per_epoch
        self.eval_interval = self.settings["eval_interval"] or per_epoch
        self.checkpoint_interval = self.settings["checkpoint_interval"] or self.eval_interval

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state`` was saved."""
        self.begin_with(state)
        hb.load_method_state(self.model, state["method"])
        self.schedule.load_state_dict(state["schedule"])

    def begin_with(self, state: dict[str, Any]) -> None:
        """Go on from what was trained, perhaps in other groups, whose gammas and errors differ.

        Raises:
            RuntimeError, ValueError: it is of another model or optimiser.
        """
        hb.load_whole_state_dict(self.model, state["model"])
        self.passes = Passes(**state["passes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.last = state["step"], state["last"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state(state["cuda_rng"][0], self.device)

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs: tensors and plain values."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.processes.model_state(self.model),
            "method": hb.method_state(self.model),
            "schedule": self.schedule.state_dict(),
            "passes": self.passes.state_dict(),
            "optimizer": self.processes.optimizer_state(self.optimizer),
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "last": self.last,
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if cuda else [],
            "sizes": self.processes.sizes,
            **self.extra_state,
        }

    def advice(self) -> hb.Advice:
        """Which gradient method suits the model as it is, on this machine; see `hb.advise`."""
        return hb.advise(
            self.model, self._batch(self.step), lambda model, batch: self._loss_of(*batch)(model)
        )

    def train(self) -> dict[str, Any]:
        """Run to the end and return the last training and evaluation records, merged.

        Raises:
            Interrupted: a signal arrived; the finished step is in the checkpoint.
            UserError: loss or gradients stopped being finite, or a file cannot be written.
        """
        with StopSignal() as stop, self._progress() as bar:
            if self.step == 0 and self.diagnostics.due(0, self.total_steps):
                self._diagnose()
            while self.step < self.total_steps:
                record = self._timed_step()
                due = self.step % self.settings["log_interval"] == 0
                if due or self.step == self.total_steps:
                    self._record(record)
                bar.set_postfix(self._shown(record), refresh=False)
                bar.update()
                if self.step in self.settings["snapshots"]:
                    self._snapshot()
                at_end = self.step == self.total_steps
                if at_end or self.step % self.eval_interval == 0:
                    self._evaluate()
                if self.diagnostics.due(self.step, self.total_steps):
                    self._diagnose()
                stopped = self.processes.agreed(stop.received)
                if at_end or stopped or self.step % self.checkpoint_interval == 0:
                    self._save()
                if stopped and not at_end:
                    raise Interrupted(stopped)
        return self.last

    def _timed_step(self) -> dict[str, Any]:
        start, cpu_start = self._clock(), time.process_time()
        lr = learning_rate(self.step, self.total_steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self._batch(self.step)
        method = self.schedule.method_for(
            self.step, self.total_steps, lambda *asked: self._measured(x, y, *asked)
        )
        hb.set_method(self.model, method)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss, scores = self.task.loss(self.trained, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss, *means = self.processes.mean(torch.stack([loss.detach(), *scores.values()]))
        norm = hb.total_norm(self.model)
        self._check_finite(loss, norm, x)
        if self.optim["clip"] is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.optim["clip"], norm)
        self.optimizer.step()
        self.step += 1
        iterations = self.passes.add(self.model, method)
        self.seconds += self._clock() - start
        self.cpu_seconds += time.process_time() - cpu_start
        return {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "train_loss": loss.item(),
            **{name: mean.item() for name, mean in zip(scores, means, strict=True)},
            "lr": lr,
            "k": getattr(method, "k", None),
            "iterations": iterations,
            **self.passes.state_dict(),
            "grad_norm": norm.item(),
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def _save(self) -> None:
        state = self.state()
        if self.processes.writes:
            checkpoint.save(self.folder.path, state)

    def _evaluate(self) -> None:
        batches = self.data.eval_batches(self.settings["eval_batch_size"], self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            scores = self.task.evaluate(self.model, ((self._laid_out(x), y) for x, y in batches))
        self._record({"step": self.step, "seconds": self.seconds, **scores})

    def _diagnose(self) -> None:
        """The gradient's error on the batch to come."""
        loss = self._loss_of(*self._batch(self.step))
        errors = self.processes.known_to_all(  # in case replicas round differently
            self.diagnostics.measure(
                self.model, loss, hb.current_method(self.model), self.processes.mean
            )
        )
        place = {"step": self.step, "seconds": self.seconds}
        self.folder.append({**place, "gradient_error": errors})
        self.log({**place, **flat(errors)}, self.step)

    def _measured(self, x: Tensor, y: Tensor, method: hb.Method, ks: Sequence[int]):
        """The gradient's errors on a batch, asked for by the schedule: part of the training."""
        errors = self.processes.known_to_all(
            hb.gradient_error(self.model, self._loss_of(x, y), ks, method, self.processes.mean)
        )
        self.passes.add_measurement(self.model, method, ks)
        return errors

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = map(self.processes.part, self.batches.batch(step))
        return self._laid_out(x), y

    def _loss_of(self, x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                return self.task.loss(model, x, y)[0]

        return loss

    def _snapshot(self) -> None:
        """Keep the weights of this moment."""
        file = self.folder.path / "snapshots" / f"{self.step}.pt"
        file.parent.mkdir(exist_ok=True)
        state = {"step": self.step, "model": self.processes.model_state(self.model)}
        if self.processes.writes:
            write_atomically(file, lambda f: torch.save(state, f))

    def _laid_out(self, x: Tensor) -> Tensor:
        images = x.dim() == 4 and self.settings["channels_last"]
        return x.contiguous(memory_format=torch.channels_last) if images else x

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.writes:
            self.folder.append(record)
            self.log(record, self.step)
        self.last = {**self.last, **record}

    def _check_finite(self, loss: Tensor, norm: Tensor, x: Tensor) -> None:
        if bool(loss.isfinite()) and bool(norm.isfinite()):
            return
        file, state = self.folder.path / "nonfinite.pt", {**self.state(), "x": x}
        if self.processes.writes:
            write_atomically(file, lambda f: torch.save(state, f))
        if loss.isfinite():
            where = f"the gradient is not finite, first in {first_nonfinite_gradient(self.model)}"
        else:
            module = first_nonfinite_output(self.model, x) or "the loss itself"
            where = f"the loss is {loss.item()}, first in the output of {module}"
        raise UserError(
            f"step {self.step + 1}: {where}; state saved in {file}, the last good checkpoint is "
            "untouched; try a smaller optim.lr or a larger k"
        )

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _progress(self) -> tqdm:
        wanted = self.settings["progress"]
        shown = sys.stderr.isatty() if wanted == "auto" else bool(wanted)
        shown = shown and self.processes.writes
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not shown,
            unit="step",
            desc=Path(self.folder.path).name,
            mininterval=0.5,
        )

    def _shown(self, record: dict[str, Any]) -> dict[str, str]:
        shown = {"loss": f"{record['train_loss']:.3f}"}
        if self.task.metric in self.last:
            shown[self.task.metric] = f"{self.last[self.task.metric]:.4f}"
        return shown
