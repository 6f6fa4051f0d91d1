"""The training objective: a model's loss on the batches of a data set, and its scores."""

from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.data.batches import Batch, Data
from experiments.identity import precision_of
from experiments.processes import OneProcess


class Objective:
    """Loss and scores in the precision of ``cfg``, on this process's part of every batch.

    Attributes:
        batches: of training, on the device.
        task: the data's loss and scores.
    """

    def __init__(
        self, cfg: DictConfig, data: Data, device: torch.device, processes: OneProcess
    ) -> None:
        self.data, self.task = data, data.task
        self.batches = data.train_batches(cfg.optim.batch_size, cfg.seed, device)
        self._device, self._processes = device, processes
        self._eval_batch_size = cfg.trainer.eval_batch_size
        self._bfloat16 = precision_of(cfg.trainer, device.type) == "bfloat16"
        self._channels_last = cfg.trainer.channels_last
        if self._channels_last == "auto":  # bfloat16 on a CPU is slower in this layout
            self._channels_last = not (self._bfloat16 and device.type == "cpu")

    def place(self, model: nn.Module) -> None:
        """Move the model to the device, in the memory layout of its images."""
        model.to(self._device)
        if self._channels_last:
            model.to(memory_format=torch.channels_last)

    def batch(self, step: int) -> Batch:
        """x (B, ...) and y (B, ...) of a step."""
        x, y = map(self._processes.part, self.batches.batch(step))
        return self._laid_out(x), y

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with a gradient, and further training scores."""
        with self._autocast():
            return self.task.loss(model, x, y)

    def loss_on(self, x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
        """The loss on one batch, as a function of the model."""
        return lambda model: self.loss(model, x, y)[0]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return scores over all test rows."""
        batches = self.data.eval_batches(self._eval_batch_size, self._device)
        with self._autocast():
            return self.task.evaluate(model, ((self._laid_out(x), y) for x, y in batches))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16)

    def _laid_out(self, x: Tensor) -> Tensor:
        images = x.dim() == 4 and self._channels_last
        return x.contiguous(memory_format=torch.channels_last) if images else x
