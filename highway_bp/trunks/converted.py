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
        _hb_trunk, _hb_name: the layer's chain, and its name in the model. An instance that the
            layer's own code makes of its class has none, and is an ordinary layer.
        _hb_class: the layer's class before conversion.
        _hb_forward: a forward that somebody has set on this instance.
    """

    _hb_trunk: Trunk | None = None
    _hb_name = ""
    _hb_class: type
    _hb_forward: Callable | None = None

    def __call__(self, *args, **kwargs):
        if "forward" not in self.__dict__:
            return self._hb_call(*args, **kwargs)
        own = self.__dict__["_hb_forward"] = self.__dict__.pop("forward")  # would hide the class's
        try:
            return self._hb_call(*args, **kwargs)
        finally:
            if self._hb_forward is own:  # it was not deleted in this call
                self.__dict__.setdefault("forward", own)

    def _hb_call(self, *args, **kwargs):
        if self._hb_is_checkpointed():  # `call._run_own` checkpoints the layer's own forward
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _hb_is_checkpointed(self) -> bool:
        """Whether transformers' gradient checkpointing is switched on for this layer."""
        return bool(
            self.training
            and getattr(self, "gradient_checkpointing", False)
            and getattr(self, "_gradient_checkpointing_func", None)
        )

    def __delattr__(self, name: str) -> None:
        if name == "forward" and self._hb_forward is not None:
            self._hb_forward = None
            self.__dict__.pop("forward", None)
        else:
            super().__delattr__(name)

    def __init_subclass__(cls) -> None:
        """Not passed on: the layer's class may register its subclasses, or require arguments."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._hb_trunk is not None:
            self._hb_trunk.add(self._hb_name, self)

    def __reduce_ex__(self, protocol):
        return _blank, (self._hb_class,), self.__getstate__()


def convert_layer(layer: nn.Module, trunk: Trunk, name: str) -> None:
    """Make ``layer``, which is called ``name`` in its model, a layer of the trunk."""
    layer._hb_trunk, layer._hb_name = trunk, name
    if not isinstance(layer, ConvertedLayer):
        layer.__class__ = converted_class(type(layer))
    trunk.add(name, layer)


@cache
def converted_class(cls: type) -> type:
    """``cls`` with a forward that is a step of a chain."""

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # Exported or traced: no chain. (is_exporting() is true within torch.compile in torch 2.11.)
        if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
            own, self._hb_forward = self._hb_forward, None
            try:
                return (own or partial(cls.forward, self))(*args, **kwargs)
            finally:
                self._hb_forward = own
        return call_layer(self, args, kwargs)

    own = {"__module__": cls.__module__, "_hb_class": cls, "forward": forward}
    return type(cls.__name__, (ConvertedLayer, cls), own)


def _blank(cls: type) -> nn.Module:
    made = converted_class(cls)
    return made.__new__(made)
