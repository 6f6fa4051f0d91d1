"""What a layer's forward pass depends on besides its input, so that it can be run once more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class Surroundings:
    """The autocast state of a layer's forward pass, and in training its random state.

    Args:
        module: the layer.
        h: the state it is given.
    """

    def __init__(self, module: nn.Module, h: Tensor):
        self._module, self._device, self._h = module, h.device, h
        self._autocast = _autocast_state(h.device.type)
        self._random = random_state(h.device) if module.training else None
        self._versions = [p._version for p in module.parameters()] + [h._version]

    def autocast(self) -> AbstractContextManager:
        """The autocast state that was in force, whenever this is called."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, *self._autocast, cache_enabled=False)

    @contextlib.contextmanager
    def restored(self, name: str) -> Iterator[None]:
        """Run the layer again: same autocast, same random numbers, buffers left as they are.

        Raises:
            RuntimeError: a weight or the layer's input has been changed in place since.
        """
        versions = [p._version for p in self._module.parameters()] + [self._h._version]
        if versions != self._versions:
            raise RuntimeError(
                f"{name} has to be run once more for its gradient, but a weight or its input has "
                "been changed in place since its forward pass"
            )
        buffers = [(b, b.clone()) for b in self._module.buffers()] if self._module.training else []
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self._random is not None), self.autocast():
            if self._random is not None:
                _set_random_state(self._device, *self._random)
            yield
        for buffer, before in buffers:
            buffer.data.copy_(before)  # .data: the graphs of other passes may have saved it


def _autocast_state(device: str) -> tuple[torch.dtype, bool] | None:
    if not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the CPU's generator, and of the device's where that is a GPU."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(device: torch.device, cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
