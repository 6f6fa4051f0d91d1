"""A converted layer: the same object with a class derived from its own, whose forward is a step
of a chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps

import torch
from torch import nn

from highway_bp.trunks.call import call_layer
from highway_bp.trunks.trunk import Trunk


class ConvertedLayer:
    """Mixed into a layer's class. The rest of the layer stays: weights, hooks, edits, isinstance.

    Attributes:
        _trunk, _name: the layer's chain, and its name in the model.
        _original: the layer's class before conversion.
        _set_forward: a forward that somebody has set on this instance.
    """

    _original: type
    _set_forward: Callable | None = None

    def __call__(self, *args, **kwargs):
        if "forward" in self.__dict__:  # it would hide the class's forward
            self.__dict__["_set_forward"] = self.__dict__.pop("forward")
        if self._is_checkpointed():  # `call._run_own` checkpoints the layer's own forward
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _is_checkpointed(self) -> bool:
        return bool(
            self.training
            and getattr(self, "gradient_checkpointing", False)
            and getattr(self, "_gradient_checkpointing_func", None)
        )

    def __setstate__(self, state):
        super().__setstate__(state)
        self._trunk.add(self._name, self)

    def __reduce_ex__(self, protocol):
        return _blank, (self._original,), self.__dict__


def convert_layer(layer: nn.Module, trunk: Trunk, name: str) -> None:
    """Make ``layer``, which is called ``name`` in its model, a layer of the trunk."""
    layer._trunk, layer._name = trunk, name
    layer.__class__ = converted_class(type(layer))
    trunk.add(name, layer)


@cache
def converted_class(cls: type) -> type:
    """``cls`` with a forward that is a step of a chain."""

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # Exported or traced: no chain. (is_exporting() is true within torch.compile in torch 2.11.)
        if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
            own, self._set_forward = self._set_forward, None
            try:
                return (own or partial(cls.forward, self))(*args, **kwargs)
            finally:
                self._set_forward = own
        return call_layer(self, args, kwargs)

    made = type(cls.__name__, (ConvertedLayer, cls), {"__module__": cls.__module__})
    made._original = cls
    made.forward = forward  # set last: transformers wraps the forward of every new class
    return made


def _blank(cls: type) -> nn.Module:
    made = converted_class(cls)
    return made.__new__(made)
