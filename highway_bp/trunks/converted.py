"""A converted layer: the same object with a class derived from its own, whose forward is a step
of a chain."""

from collections.abc import Callable
from functools import cache, partial, wraps

import torch
from torch import nn

from highway_bp.trunks.call import call_layer
from highway_bp.trunks.trunk import Trunk


class ConvertedLayer:
    """Mixed into a layer's class. The rest of the layer stays: weights, hooks, edits, isinstance.

    Calling it runs a step of a chain. The step runs the layer's own forward: the one set on the
    instance if there is one, else that of a class derived since conversion, else `_hb_class`'s.

    Attributes:
        _hb_trunk, _hb_name: the layer's chain, and its name in the model. An instance that the
            layer's own code makes of its class has none, and is an ordinary layer.
        _hb_class: the layer's class before conversion.
        _hb_step: the forward of the converted class.
    """

    _hb_trunk: Trunk | None = None
    _hb_name = ""
    _hb_class: type
    _hb_step: Callable

    def __call__(self, *args, **kwargs):
        own = self.forward
        if _is_step(own):
            return self._hb_call(*args, **kwargs)
        attributes = self.__dict__
        before = attributes.get("forward")
        step = attributes["forward"] = partial(_step, self, own)
        try:
            return self._hb_call(*args, **kwargs)
        finally:
            if attributes.get("forward") is step:  # else it was set or deleted in this call
                attributes.pop("forward")
                if before is not None:
                    attributes["forward"] = before

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

    def __init_subclass__(cls) -> None:
        """Not passed on: the layer's class may register its subclasses, or require arguments."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._hb_trunk is not None:
            self._hb_trunk.add(self._hb_name, self)

    def __reduce_ex__(self, protocol):
        if type(self) is not converted_class(self._hb_class):
            return super().__reduce_ex__(protocol)  # of a class derived since conversion
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
        return _step(self, partial(cls.forward, self), *args, **kwargs)

    own = {"__module__": cls.__module__, "_hb_class": cls, "_hb_step": forward, "forward": forward}
    return type(cls.__name__, (ConvertedLayer, cls), own)


def _step(layer: ConvertedLayer, own: Callable, *args, **kwargs):
    # Exported or traced: no chain. (is_exporting() is true within torch.compile in torch 2.11.)
    if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
        return own(*args, **kwargs)
    return call_layer(layer, own, args, kwargs)


def _is_step(forward: Callable) -> bool:
    if isinstance(forward, partial):
        return forward.func is _step
    layer = getattr(forward, "__self__", None)
    return isinstance(layer, ConvertedLayer) and forward.__func__ is layer._hb_step


def _blank(cls: type) -> nn.Module:
    made = converted_class(cls)
    return made.__new__(made)
