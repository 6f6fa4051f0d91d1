"""A call of a converted layer: a step of its chain, or the layer's own forward pass."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as modules

from highway_bp.asked import innermost_call
from highway_bp.containers import is_cache, leaves, replaced, wants_gradient
from highway_bp.flow import is_tap
from highway_bp.layer_call import LayerResult, carry_of, state_of
from highway_bp.one_pass import solving
from highway_bp.step import step
from highway_bp.surroundings import kept_buffers, modules_of
from highway_bp.trunks.carries import recorded_carry

if TYPE_CHECKING:
    from highway_bp.trunks.converted import ConvertedLayer

_running = threading.local()  # .layers: those whose own forward is running in this thread


def call_layer(layer: ConvertedLayer, own: Callable, args: tuple, kwargs: dict) -> Any:
    """Run the layer's ``own`` forward pass, as a step of its chain if it can be one.

    Raises:
        RuntimeError: the layer cannot be a step of a chain in this use.
    """
    trunk = layer._hb_trunk
    if trunk is not None and trunk.method.group_size is not None:
        if torch.is_grad_enabled():
            return _in_chain(layer, own, args, kwargs)
        if layer.training and _in_function_forward():
            trunk.warn_once(
                "function",
                f"{TrunkLayer(layer, own).name} runs inside a torch.autograd.Function, which "
                "computes its gradient itself: no chain",
            )
    return _run_own(layer, own, args, kwargs)


@dataclass(frozen=True)
class TrunkLayer:
    """A converted layer as a chain runs it.

    Attributes:
        own: its forward pass at the time of the call.
        keyword: the name by which ``own`` gets the state; None by position.
    """

    module: nn.Module
    own: Callable
    keyword: str | None = None

    @property
    def name(self) -> str:
        return f"{self.key} ({type(self.module).__name__})"

    @property
    def key(self) -> str:
        return self.module._hb_name

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> LayerResult:
        out, carry = self.run_own(h, args, kwargs), carry_of(self)
        if carry is None and (state := state_of(out)) is not None:
            carry = recorded_carry(h, state)
        return LayerResult(out, carry)

    def run_own(self, h: Tensor, args: tuple, kwargs: dict) -> Any:
        if self.keyword is None:
            return _run_own(self.module, self.own, (h, *args), kwargs)
        return _run_own(self.module, self.own, args, {self.keyword: h, **kwargs})


def _in_chain(layer: ConvertedLayer, own: Callable, args: tuple, kwargs: dict) -> Any:
    if layer in getattr(_running, "layers", ()):  # called within its own forward: no step
        return own(*args, **kwargs)
    others = dict(kwargs)
    keyword = None if args else _first_argument(layer._hb_class)
    h = args[0] if args else others.pop(keyword, None)
    trunk, named = layer._hb_trunk, TrunkLayer(layer, own, keyword)
    is_state = isinstance(h, Tensor) and h.is_floating_point() and not h.is_nested
    wanted = wants_gradient((args, kwargs), layer.parameters())
    in_backward = torch._C._current_graph_task_id() != -1
    # `torch.utils.checkpoint` around this layer, or around more than it, computes it again.
    if solving() or (in_backward and _is_recomputed()):
        if is_state and not h.requires_grad and wanted:
            x = h.detach().requires_grad_()  # as in the forward pass: the same tensors are saved
            return replaced(named.run_own(x, args[1:], others), {id(x): h})
        return _run_own(layer, own, args, kwargs)
    if in_backward and _in_function_backward():
        raise RuntimeError(
            f"{named.name} is run inside a backward pass, as re-entrant checkpointing "
            "and reversible layers do; expected use_reentrant=False, or Backprop()"
        )
    if not is_state:
        if not isinstance(h, torch.fx.Proxy):  # `symbolic_trace` records what is inside the layer
            trunk.warn_once(
                "state",
                f"{named.name} does not get a floating tensor (that is not nested) as its first "
                "argument: it runs as before, outside any chain",
            )
        return _run_own(layer, own, args, kwargs)
    if not wanted:
        return _run_own(layer, own, args, kwargs)
    _check_supported(named)
    is_new = trunk.add(layer._hb_name, layer)
    if not is_tap(h.grad_fn):
        trunk.warn_of_break(named)
    elif (other := h.grad_fn.one_pass.chain) is not trunk:
        trunk.warn_of_copy(named, other)
    return step(trunk, named, h, args[1:], others, first=is_new)


def _run_own(layer: ConvertedLayer, own: Callable, args: tuple, kwargs: dict) -> Any:
    """Run the forward pass that the layer would have without conversion."""

    def run(*args):  # checkpointing runs it again during a solve; buffers must not change then
        with kept_buffers(layer) if solving() else contextlib.nullcontext():
            return _marked(layer, own, *args, **kwargs)

    if not (layer._hb_is_checkpointed() and torch.is_grad_enabled()) or solving():
        return run(*args)
    checkpoint = layer._gradient_checkpointing_func
    keywords = getattr(checkpoint, "keywords", {})
    trunk = layer._hb_trunk
    if keywords.get("use_reentrant") is True and trunk is not None and trunk.method.group_size:
        raise ValueError(
            "re-entrant checkpointing of a converted model; expected "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    if caches := [v for v in leaves((args, kwargs)) if is_cache(v)]:
        args, kwargs = replaced((args, kwargs), dict.fromkeys(map(id, caches)), copies=True)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return checkpoint(run, *args)


def _marked(layer: ConvertedLayer, forward: Callable, *args, **kwargs) -> Any:
    before = getattr(_running, "layers", ())
    _running.layers = (*before, layer)
    try:
        return forward(*args, **kwargs)
    finally:
        _running.layers = before


def _in_function_forward() -> bool:
    """Whether the forward of an autograd function is calling, as with some reversible layers."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:  # re-entrant checkpointing is refused in its backward pass
            return not frame.f_locals["cls"].__name__.startswith("CheckpointFunction")
        frame = frame.f_back
    return False


_APPLY = torch.autograd.Function.apply.__func__.__code__


def _in_function_backward() -> bool:
    """Whether a custom function's backward pass runs this, not a tensor's hook (GradCache), which
    runs forward and backward passes of its own."""
    frame = sys._getframe()
    end = innermost_call(frame)
    while frame is not None and frame is not end:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def _is_recomputed() -> bool:
    """Whether checkpointing that is not re-entrant runs a part of the model again.

    The innermost saved-tensor hook is then that of the recomputation, or of a checkpoint inside.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    names = ("_recomputation_hook", "_checkpoint_hook")
    return hooks is not None and any(name in hooks[0].__qualname__ for name in names)


@cache
def _first_argument(cls: type) -> str | None:
    """The name by which a layer may be given its state; None if it takes it by position alone."""
    _, *rest = signature(cls.forward).parameters.values()
    first = next(iter(rest), None)
    return first.name if first and first.kind is first.POSITIONAL_OR_KEYWORD else None


_GLOBAL_HOOKS = modules._global_backward_hooks, modules._global_backward_pre_hooks


def _check_supported(named: TrunkLayer) -> None:
    layer = named.module
    hooks = (layer._backward_hooks, layer._backward_pre_hooks, *_GLOBAL_HOOKS)
    if any(hooks):
        raise RuntimeError(
            f"{named.name} has a module backward hook, which sees nothing of a chain; "
            "expected a hook on its output (a tensor), or Backprop()"
        )
    if any(m._backward_hooks or m._backward_pre_hooks for m in modules_of(layer)):
        layer._hb_trunk.warn_once(
            "hooks",
            f"backward hooks of modules inside {named.name} run once per iteration, "
            "each time with a share of the gradient; hooks on states and parameters see all of it",
        )
    if layer.__dict__.get("_is_replica"):
        raise RuntimeError("a converted model in DataParallel; expected DistributedDataParallel")
    if layer.__dict__.get("_is_fsdp_managed_module") or _is_fsdp(type(layer)):
        raise RuntimeError(
            "a converted model in FSDP, which frees a layer's weights before its gradient is "
            "solved; expected DistributedDataParallel, or Backprop()"
        )


@cache
def _is_fsdp(cls: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)
