"""The training loop: steps, evaluation, checkpoints, and stopping in good order."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import highway_bp as hb
from experiments.cuda_graphs import GraphedPasses, Passed
from experiments.errors import UserError
from experiments.interrupt import Interrupted, stop_signal
from experiments.nonfinite import Diverged, first_nonfinite_gradient, first_nonfinite_output
from experiments.objective import Objective
from experiments.optimizer import build_optimizer, learning_rate
from experiments.passes import Passes
from experiments.plan import Plan
from experiments.provenance import peak_memory_mb
from experiments.run_folder import RunFolder

MINUTE = 60.0  # seconds between two lines of progress where there is no terminal
LINE = "{desc}: step {n_fmt} of {total_fmt}{postfix}\n"


@dataclass(frozen=True)
class Unread:
    """The measurements of step number ``step``, still on the device.

    known: what is known of the step already. values: (2 + scores,) gradient norm, loss, training
    scores. x: the step's batch.
    """

    step: int
    known: dict[str, Any]
    names: Sequence[str]
    values: Tensor
    x: Tensor


@dataclass
class Trainer:
    """Trains a model as planned.

    Args:
        log: the second writer's ``log(record)``.
        lasting: further entries of every checkpoint (config hash, the run it continues).

    Attributes:
        trained: the module that is called for gradients: the model, or its replica.
        last: the last training and evaluation records, merged.
        cpu_seconds: processor time: more than ``seconds`` with threads, less on a shared processor.
    """

    plan: Plan
    objective: Objective
    model: nn.Module
    folder: RunFolder
    log: Callable[[dict[str, Any]], None]
    lasting: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    passes: Passes = field(default_factory=Passes)
    last: dict[str, Any] = field(default_factory=dict)
    _unread: list[Unread] = field(default_factory=list)
    _method: hb.Method | None = None  # the model's current method

    def __post_init__(self) -> None:
        settings, processes = self.plan.cfg.trainer, self.plan.processes
        self.objective.place(self.model)
        self.model.train()
        self.trained = processes.shard(self.model)
        self._graphs = GraphedPasses(self.model, self._pass) if settings.cuda_graph else None
        self.optimizer = build_optimizer(self.model, self.plan.cfg.optim)
        per_epoch = self.objective.batches.steps_per_epoch
        self.total_steps = self.plan.steps(per_epoch)
        if max(settings.snapshots, default=0) > self.total_steps:
            raise UserError(
                f"trainer.snapshots={list(settings.snapshots)}; expected steps up to "
                f"{self.total_steps}, the last one"
            )
        self.eval_interval = settings.eval_interval or per_epoch
        self.checkpoint_interval = settings.checkpoint_interval or self.eval_interval

    def restore(self, state: dict[str, Any]) -> None:
        """Resume exactly where ``state`` was saved.

        Another run's state may lack "last" and the states of method and schedule. A state of
        another model or optimiser raises RuntimeError, ValueError, ...
        """
        hb.load_whole_state_dict(self.model, state["model"])
        self.passes = Passes(**state["passes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.last = state["step"], state.get("last", {})
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        torch.set_rng_state(state["rng"])
        if self.plan.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state(state["cuda_rng"][0], self.plan.device)
        if "method" in state:
            hb.load_method_state(self.model, state["method"])
            self.plan.schedule.load_state_dict(state["schedule"])

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs: tensors and plain values."""
        device = self.plan.device
        cuda_rng = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return {
            "model": hb.whole_state_dict(self.model),
            "method": hb.method_state(self.model),
            "schedule": self.plan.schedule.state_dict(),
            "passes": asdict(self.passes),
            "optimizer": self.plan.processes.optimizer_state(self.optimizer),
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "last": self.last,
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda_rng,
            **self.lasting,
        }

    def advice(self) -> hb.Advice:
        """Which gradient method suits the model as it is, on this machine; see `hb.advise`."""
        batch, loss = self.objective.batch(self.step), self.objective.loss
        return hb.advise(self.model, batch, lambda model, batch: loss(model, *batch)[0])

    def train(self) -> None:
        """Run to the end; ``last`` then holds the last training and evaluation records, merged.

        Raises:
            Interrupted: a signal arrived; the finished step is in the checkpoint.
            Diverged: loss or gradients stopped being finite.
            UserError: a file cannot be written.
        """
        with stop_signal() as stop, self._progress() as progress:
            self._measure()
            while self.step < self.total_steps:
                self._step()
                progress.update()
                if self._must_read():
                    self._read()
                if self.step in self.plan.cfg.trainer.snapshots:
                    weights = {"step": self.step, "model": hb.whole_state_dict(self.model)}
                    self.folder.keep(f"snapshots/{self.step}.pt", weights)
                stopped = self.plan.processes.any_signal(stop.received)
                if stopped or self._at(self.checkpoint_interval):
                    self._read()
                    self.folder.save(self.state())
                if stopped:
                    raise Interrupted(stopped)
                self._measure()
                if not self._unread:
                    progress.set_postfix_str(self._shown(), refresh=False)
            # A signal in the last evaluation has to end a sweep.
            if stopped := self.plan.processes.any_signal(stop.received):
                raise Interrupted(stopped)

    def costs(self) -> dict[str, Any]:
        """What training has cost so far."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            **asdict(self.passes),
            "peak_memory_mb": peak_memory_mb(self.plan.device),
        }

    def _step(self) -> None:
        """Do one step; its measurements stay on the device until `_read`."""
        if not self._unread:
            self._clocks = time.perf_counter(), time.process_time()
        optim = self.plan.cfg.optim
        lr = learning_rate(self.step, self.total_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self.objective.batch(self.step)
        method = self._set_method(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        passed = self._graphs(method, x, y) if self._graphs else self._pass(x, y)
        means = self.plan.processes.mean(torch.stack([*passed.measured.values()]))
        norm = hb.total_norm(self.model)
        measured = torch.cat([norm[None], means])
        names = ("grad_norm", *passed.measured)
        known = {"lr": lr, "k": getattr(method, "k", None), "iterations": passed.iterations}
        self._unread.append(Unread(self.step + 1, known, names, measured, x))
        if self.plan.device.type == "cpu":  # reading is free: check before the weights change
            self._check_finite(self._unread[-1], measured.tolist())
        if optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), optim.clip, norm)
        self.optimizer.step()
        self.step += 1
        self.passes.add(self.model, method, passed.iterations)

    def _pass(self, x: Tensor, y: Tensor) -> Passed:
        """Return loss and training scores of a batch; the parameters get their gradients."""
        loss, scores = self.objective.loss(self.trained, x, y)
        loss.backward()
        return Passed({"train_loss": loss.detach(), **scores}, hb.iterations(self.model))

    def _set_method(self, x: Tensor, y: Tensor) -> hb.Method:
        """Give the model the method of this step; the schedule may measure errors to choose it."""

        def measured(method: hb.Method, ks: Sequence[int]) -> list[hb.GradientError]:
            loss, processes = self.objective.loss_on(x, y), self.plan.processes
            errors = hb.gradient_error(self.model, loss, ks, method, processes.mean)
            self.passes.add_measurement(self.model, method, ks)
            return processes.broadcast(errors)

        method = self.plan.schedule.method_for(self.step, self.total_steps, measured)
        if method != self._method:
            hb.set_method(self.model, method)
            self._method = method
        return method

    def _at(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def _must_diagnose(self) -> bool:
        at = self.plan.cfg.diagnostics.at
        return self.step in {round(fraction * self.total_steps) for fraction in at}

    def _must_read(self) -> bool:
        """Whether measurements are needed now; if not, do not wait for the GPU to read them."""
        settings = self.plan.cfg.trainer
        intervals = (settings.log_interval, self.eval_interval, self.checkpoint_interval)
        return (
            self.plan.device.type == "cpu"
            or any(map(self._at, intervals))
            or self.step in settings.snapshots
            or self._must_diagnose()
        )

    def _read(self) -> None:
        """Wait for the device, stop the clocks, and record the last step if it is due."""
        if not self._unread:
            return
        values = torch.stack([unread.values for unread in self._unread]).tolist()
        for unread, of_step in zip(self._unread, values, strict=True):
            self._check_finite(unread, of_step)
        wall, processor = self._clocks
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - processor
        last = self._unread[-1]
        self._unread = []
        self._read_last = dict(zip(last.names, values[-1], strict=True))
        if self._at(self.plan.cfg.trainer.log_interval):
            self._record({**self.costs(), **self._read_last, **last.known})

    def _measure(self) -> None:
        """Evaluate and diagnose where that is due. The step's checkpoint is there already: if this
        fails, no step is lost. A run that begins with a checkpoint measures at its step again."""
        if self.step and self._at(self.eval_interval):
            self._evaluate()
        if self._must_diagnose():
            self._diagnose()

    def _evaluate(self) -> None:
        scores = self.objective.evaluate(self.model)
        finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
        self._record({"seconds": self.seconds, **finite})
        if self.step == self.total_steps and None in finite.values():
            raise Diverged(self.step, f"the final evaluation gave {scores}")

    def _diagnose(self) -> None:
        """Record the gradient's error on the next batch at every k, as in the paper's Figure 6."""
        settings, processes = self.plan.cfg.diagnostics, self.plan.processes
        loss = self.objective.loss_on(*self.objective.batch(self.step))
        method = hb.current_method(self.model)
        if not hasattr(method, "k"):
            method = hb.Highway(0, settings.gamma)
        errors = hb.gradient_error(self.model, loss, list(settings.ks), method, processes.mean)
        found = [{n: v for n, v in asdict(e).items() if n != "parameters"} for e in errors]
        found = processes.broadcast(found)  # in case replicas round differently
        self._write({"seconds": self.seconds, "gradient_error": found})

    def _record(self, values: dict[str, Any]) -> None:
        self.last = {**self.last, **self._write(values)}

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        record = {"step": self.step, **values}
        self.folder.append(record)
        self.log(record)
        return record

    def _check_finite(self, unread: Unread, values: Sequence[float]) -> None:
        norm, loss, *_ = values
        if math.isfinite(norm) and math.isfinite(loss):
            return
        file = self.folder.keep("nonfinite.pt", {**self.state(), "x": unread.x})
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
        """Return a bar on a terminal, elsewhere a line a minute."""
        wanted = self.folder.writes and self.plan.cfg.trainer.progress
        if wanted == "auto" and not sys.stderr.isatty():
            look = {"file": sys.stdout, "bar_format": LINE, "delay": MINUTE}
            look |= {"mininterval": MINUTE, "maxinterval": MINUTE, "miniters": 1}
        else:
            look = {"disable": not wanted, "unit": "step", "mininterval": 0.5}
        return tqdm(total=self.total_steps, initial=self.step, desc=self.folder.path.name, **look)

    def _shown(self) -> str:
        metric = self.objective.task.metric
        score = self.last.get(metric)
        shown = f"loss {self._read_last['train_loss']:.3f}"
        return shown if score is None else f"{shown}, {metric} {score:.4f}"
