"""The training loop: steps, evaluation, checkpoints, and stopping in good order."""

from __future__ import annotations

import math
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
from experiments.data.batches import Data
from experiments.diagnostics import Diagnostics, flat
from experiments.identity import precision_of
from experiments.interrupt import Interrupted, stop_signal
from experiments.nonfinite import Diverged, first_nonfinite_gradient, first_nonfinite_output
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


@dataclass(frozen=True)
class Unread:
    """What step number ``step`` has measured: (2 + scores,) gradient norm, loss, training scores;
    x: its batch."""

    step: int
    lr: float
    method: hb.Method
    values: Tensor
    x: Tensor


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
    """

    model: nn.Module
    data: Data
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
    last: dict[str, Any] = field(default_factory=dict)
    _unread: list[Unread] = field(default_factory=list)
    _method: hb.Method | None = None  # that the model has now

    def __post_init__(self) -> None:
        self.task = self.data.task
        self.batches = self.data.train_batches(self.optim["batch_size"], self.seed, self.device)
        self.model.to(self.device)
        self.amp = precision_of(self.settings, self.device.type) == "bfloat16"
        wanted, slower = self.settings["channels_last"], self.amp and self.device.type == "cpu"
        self.channels_last = not slower if wanted == "auto" else wanted
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        self.processes.share(self.model)
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
            "model": hb.whole_state_dict(self.model),
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
            **self.extra_state,
        }

    def advice(self) -> hb.Advice:
        """Which gradient method suits the model as it is, on this machine; see `hb.advise`."""
        return hb.advise(
            self.model, self._batch(self.step), lambda model, batch: self._loss_of(*batch)(model)
        )

    def train(self) -> None:
        """Run to the end; ``last`` then holds the last training and evaluation records, merged.

        Raises:
            Interrupted: a signal arrived; the finished step is in the checkpoint.
            Diverged: loss or gradients stopped being finite.
            UserError: a file cannot be written.
        """
        with stop_signal() as stop, self._progress() as bar:
            if self.step == 0 and self.diagnostics.due(0, self.total_steps):
                self._diagnose()
            while self.step < self.total_steps:
                self._step()
                bar.update()
                at_end = self.step == self.total_steps
                if self._reads():
                    self._read()
                    bar.set_postfix(self._shown(), refresh=False)
                if self.step in self.settings["snapshots"]:
                    self._snapshot()
                if at_end or self.step % self.eval_interval == 0:
                    self._evaluate()
                if self.diagnostics.due(self.step, self.total_steps):
                    self._diagnose()
                stopped = self.processes.agreed(stop.received)
                if at_end or stopped or self.step % self.checkpoint_interval == 0:
                    self._read()
                    self._save()
                if stopped and not at_end:
                    raise Interrupted(stopped)

    def costs(self) -> dict[str, Any]:
        """What training has cost so far."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            **self.passes.state_dict(),
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def _step(self) -> None:
        """One step; what it measures stays on the device until `_read`."""
        if not self._unread:
            self._clocks = time.perf_counter(), time.process_time()
        lr = learning_rate(self.step, self.total_steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self._batch(self.step)
        method = self.schedule.method_for(
            self.step, self.total_steps, lambda *asked: self._measured(x, y, *asked)
        )
        if method != self._method:
            hb.set_method(self.model, method)
            self._method = method
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss, scores = self.task.loss(self.trained, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        means = self.processes.mean(torch.stack([loss.detach(), *scores.values()]))
        norm = hb.total_norm(self.model)
        self._unread.append(Unread(self.step + 1, lr, method, torch.cat([norm[None], means]), x))
        if self.device.type == "cpu":  # reading is free: weights are still what they were
            self._check_finite(self._unread[-1])
        if self.optim["clip"] is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.optim["clip"], norm)
        self.optimizer.step()
        self.step += 1
        self._names = ["grad_norm", "train_loss", *scores]
        self._iterations = self.passes.add(self.model, method)

    def _reads(self) -> bool:
        """Whether what steps have measured is needed now; a GPU is not to be waited for."""
        intervals = (self.settings["log_interval"], self.eval_interval, self.checkpoint_interval)
        return (
            self.device.type == "cpu"
            or self.step == self.total_steps
            or any(self.step % interval == 0 for interval in intervals)
            or self.step in self.settings["snapshots"]
            or self.diagnostics.due(self.step, self.total_steps)
        )

    def _read(self) -> None:
        """Wait for the device, stop the clocks, and record the last step if it is due."""
        if not self._unread:
            return
        for unread in self._unread:
            self._check_finite(unread)
        wall, processor = self._clocks
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - processor
        last = self._unread[-1]
        self._unread = []
        self._read_last = dict(zip(self._names, last.values.tolist(), strict=True))
        if self.step % self.settings["log_interval"] == 0 or self.step == self.total_steps:
            self._record(
                {
                    "step": self.step,
                    **self.costs(),
                    **self._read_last,
                    "lr": last.lr,
                    "k": getattr(last.method, "k", None),
                    "iterations": self._iterations,
                }
            )

    def _save(self) -> None:
        state = self.state()
        if self.processes.writes:
            checkpoint.save(self.folder.path, state)

    def _evaluate(self) -> None:
        batches = self.data.eval_batches(self.settings["eval_batch_size"], self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            scores = self.task.evaluate(self.model, ((self._laid_out(x), y) for x, y in batches))
        finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
        self._record({"step": self.step, "seconds": self.seconds, **finite})
        if self.step == self.total_steps and None in finite.values():
            raise Diverged(self.step, f"the final evaluation gave {scores}")

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
        state = {"step": self.step, "model": hb.whole_state_dict(self.model)}
        if self.processes.writes:
            write_atomically(file, lambda f: torch.save(state, f))

    def _laid_out(self, x: Tensor) -> Tensor:
        images = x.dim() == 4 and self.channels_last
        return x.contiguous(memory_format=torch.channels_last) if images else x

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.writes:
            self.folder.append(record)
            self.log(record, self.step)
        self.last = {**self.last, **record}

    def _check_finite(self, unread: Unread) -> None:
        norm, loss, *_ = unread.values.tolist()
        if math.isfinite(norm) and math.isfinite(loss):
            return
        file, state = self.folder.path / "nonfinite.pt", {**self.state(), "x": unread.x}
        if self.processes.writes:
            write_atomically(file, lambda f: torch.save(state, f))
        if math.isfinite(loss):
            where = f"the gradient is not finite, first in {first_nonfinite_gradient(self.model)}"
        else:
            module = first_nonfinite_output(self.model, unread.x) or "the loss itself"
            where = f"the loss is {loss}, first in the output of {module}"
        raise Diverged(
            unread.step - 1,
            f"step {unread.step}: {where}; state saved in {file}, the last good checkpoint is "
            "untouched; try a smaller optim.lr or a larger k",
        )

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

    def _shown(self) -> dict[str, str]:
        shown = {"loss": f"{self._read_last['train_loss']:.3f}"}
        if self.last.get(self.task.metric) is not None:
            shown[self.task.metric] = f"{self.last[self.task.metric]:.4f}"
        return shown
