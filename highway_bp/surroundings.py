"""What a layer's forward pass depends on besides its input, so that the layer can run again."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import Tensor, nn

from highway_bp.recorded import recorded, recording


class Surroundings:
    """The autocast state, the random state and the settings of a layer's forward pass, and what was
    recorded.

    Args:
        module: the layer.
        h: the state it is given.

    Attributes:
        autocast: a context with the autocast state of the forward pass.
    """

    def __init__(self, module: nn.Module, h: Tensor):
        self._module, self._device, self._h = module, h.device, h
        self.autocast = autocast(h.device)
        self._random = random_state(h.device)
        self._versions, self._recorded = _versions(module, h), list(recorded())
        self._settings = settings_of(module)

    @contextlib.contextmanager
    def restored(self, name: str) -> Iterator[None]:
        """A context to run the layer again: same autocast, random numbers and settings; buffers
        kept.

        Raises:
            RuntimeError: a weight or the layer's input has been changed since the first run.
        """
        if _versions(self._module, self._h) != self._versions:
            why = "a weight or its input has been changed since its forward pass"
            refuse_second_run(name, why)
        with (
            kept_buffers(self._module),
            kept_random_state(self._device),
            with_settings(self._settings),
            self.autocast,
        ):
            _set_random_state(self._device, *self._random)
            with recording(self._recorded):
                yield


def refuse_second_run(
    name: str, why: str, instead: str = "backward(retain_graph=True), which needs no second run"
) -> NoReturn:
    raise RuntimeError(
        f"{name} has to be run once more for its gradient, but {why}; expected {instead}, or "
        "Backprop()"
    )


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers on exit: the same tensors with the same values."""
    of_each = [(m, dict(m._buffers)) for m in modules_of(module)]
    values = [(b, b.clone()) for _, buffers in of_each for b in buffers.values() if b is not None]
    try:
        yield
    finally:
        for m, buffers in of_each:
            m._buffers.update(buffers)
        for buffer, before in values:
            buffer.data.copy_(before)  # .data: graphs of other passes may have saved the buffer


def kept_random_state(device: torch.device) -> AbstractContextManager:
    """Restore the states of the CPU's generator, and of the device's, on exit."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


Settings = list[tuple[dict, dict, list[str]]]


def settings_of(module: nn.Module) -> Settings:
    """Of all modules inside: attributes, the settings among them, the names of all attributes."""
    return [(d, _settings(d.copy()), list(d)) for d in map(vars, modules_of(module))]


def _settings(attributes: dict) -> dict:
    return {name: v for name, v in attributes.items() if type(v) in _KINDS}


_KINDS = frozenset([bool, int, float, str, type(None)])


@contextlib.contextmanager
def with_settings(settings: Settings) -> Iterator[None]:
    """A context in which the modules have these settings. What has to change for it, and that
    alone, is restored on exit: other threads may set others."""
    changed = []
    for attributes, values, names in settings:
        now = dict(attributes)
        added = [name for name in _settings(now) if name not in names]  # hides the class's own
        others = [name for name, v in values.items() if not _is_same(now.get(name, now), v)]
        before = {name: now[name] for name in (*added, *others) if name in now}
        changed.append((attributes, before, {name: values[name] for name in others}))
    try:
        for attributes, before, values in changed:
            _exchange(attributes, before, values)
        yield
    finally:
        for attributes, before, values in changed:
            _exchange(attributes, values, before)


def _is_same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _exchange(attributes: dict, old: Iterable[str], new: dict) -> None:
    for name in old:
        attributes.pop(name, None)
    attributes.update(new)


def _versions(module: nn.Module, h: Tensor) -> list[tuple[int, int | None]]:
    return [(id(t), version_of(t)) for t in (*parameters_of(module), h)]


def version_of(t: Tensor) -> int | None:
    """How often t was written into; None in inference mode, which does not count."""
    return None if t.is_inference() else t._version


def modules_of(module: nn.Module) -> dict[nn.Module, None]:
    """As `module.modules()` in another order, in a third of the time: every layer call needs it."""
    found: dict[nn.Module, None] = {}
    rest: list[nn.Module | None] = [module]
    while rest:
        m = rest.pop()
        if m is not None and m not in found:
            found[m] = None
            rest += m._modules.values()
    return found


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """As `module.parameters()` but faster; a shared parameter occurs more than once."""
    return [p for m in modules_of(module) for p in m._parameters.values() if p is not None]


def autocast(device: torch.device, enabled: bool | None = None) -> AbstractContextManager:
    """The device's autocast region as it is now, or as ``enabled`` says; nothing on devices without
    autocast. Weights are not cached: a pass without a graph would cache weights without a graph."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    enabled = torch.is_autocast_enabled(kind) if enabled is None else enabled
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled, cache_enabled=False)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the CPU's generator and of the device's generator (None unless a GPU)."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(device: torch.device, cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
