"""One run of consecutive layers with its local autograd graph: f, and its block's Jacobian J."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from highway_bp.carry import Carry, Identity, as_carry


@dataclass
class Segment:
    """Layers a+1 .. e, run once from a leaf copy of h_a; their graph is kept for the backward.

    Attributes:
        names: how errors call each layer.
        h_in: the leaf h_a.
        states: h_{a+1} .. h_e, attached to the local graph.
        carries: what each layer's ``with_carry`` gave as its K, else None.
        split: True when the graph holds the path through the block alone (the residual path is
            cut), so that a vector-Jacobian product gives w J; otherwise it gives w (J + K).
        autocast: gives the autocast state of the forward pass, under which carries are formed.
        z: what the block of a split layer returned, until it has been checked.
    """

    layers: Sequence[nn.Module]
    names: Sequence[str]
    h_in: Tensor
    states: list[Tensor]
    carries: list[object]
    split: bool
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
    z: Tensor | None = None

    @property
    def h_out(self) -> Tensor:
        return self.states[-1]

    def vjp(self, w: Tensor) -> Tensor | None:
        """w J (``split``) or w (J + K), a tensor that may be written into; None for zero."""
        v = self._grad([self.h_out], [w])
        return None if v is None else _owned(v, w)

    def inner_cotangent(self, b: Sequence[Tensor | None]) -> Tensor | None:
        """What losses on the states inside the run, h_{a+1} .. h_{e-1}, send to h_a."""
        pairs = [(h, b_h) for h, b_h in zip(self.states[:-1], b, strict=True) if b_h is not None]
        return self._grad([h for h, _ in pairs], [b_h for _, b_h in pairs]) if pairs else None

    def through(self, w: Tensor, block: float, carry: float) -> Tensor | None:
        """w (block J + carry K); None for zero. May be written into, unless it is w itself."""
        v = self.vjp(w) if block else None
        if v is not None and block != 1:
            v = v.mul_(block)
        # The graph gives w J or w (J + K); what is missing or too much is a multiple of w K.
        share = carry if self.split else carry - block
        return self.K.accumulate_(v, w, share) if share != 0 else v

    @cached_property
    def K(self) -> Carry:
        """The carry of the run, K_e ... K_{a+1}, formed where it is first asked for."""
        K: Carry = Identity()
        for i in reversed(range(len(self.layers))):
            K = K @ self._layer_carry(i)
        return K

    def _layer_carry(self, i: int) -> Carry:
        h_in = (self.states[i - 1] if i else self.h_in).detach()
        h_out = self.states[i].detach()
        given, carry = self.carries[i], getattr(self.layers[i], "carry", None)
        if given is None and carry is not None:
            with self.autocast():
                given = carry(h_in, h_out)
        K = as_carry(given, h_out, self.names[i])
        if h_in.shape != h_out.shape:
            _check_maps(K, h_in, h_out, self.names[i])
        return K

    def _grad(self, outputs: list[Tensor], cotangents: list[Tensor]) -> Tensor | None:
        if not self.h_in.requires_grad:
            return None
        used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not used:
            return None
        outs, grads = zip(*used, strict=True)
        (v,) = torch.autograd.grad(outs, self.h_in, grads, retain_graph=True, allow_unused=True)
        return v


def run_segment(
    layers: Sequence[nn.Module], names: Sequence[str], h: Tensor, args: tuple, kwargs: dict
) -> Segment:
    """Run layers from a detached copy of h, whose ``requires_grad`` tells if w is wanted there."""
    h_in = h.detach().requires_grad_(h.requires_grad)
    split = len(layers) == 1 and offers_split(layers[0])
    states: list[Tensor] = []
    carries: list[object] = []
    for layer, name in zip(layers, names, strict=True):
        x, K, z = states[-1] if states else h_in, None, None
        version = x._version
        with _named_in_place_errors(name):
            if split:
                z = layer.block(x, *args, **kwargs)
                out = layer.residual(x.detach(), z)
            elif hasattr(layer, "with_carry") and _is_plain(layer):
                out, K = layer.with_carry(x, *args, **kwargs)
            else:
                out = layer(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{name} returned a {type(out).__name__}; a layer of a ResidualChain maps one "
                "tensor to one tensor: wrap it so that it returns the state alone"
            )
        if x._version != version:
            raise RuntimeError(_IN_PLACE.format(name))
        states.append(out)
        carries.append(K)
    return Segment(layers, names, h_in, states, carries, split, autocast_here(h.device.type), z)


def autocast_here(device: str) -> Callable[[], AbstractContextManager]:
    """Enters, whenever it is called, the autocast state that a device is in now."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    return partial(
        torch.autocast,
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


_IN_PLACE = "{} changes its input in place; a layer of a ResidualChain returns a new tensor"


@contextlib.contextmanager
def _named_in_place_errors(name: str):
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad is being used in an in-place" in str(error):
            raise RuntimeError(_IN_PLACE.format(name)) from error
        raise


def offers_split(layer: nn.Module) -> bool:
    """Whether the layer can be run as residual(h, block(h)) with no difference to calling it.

    Not for compiled layers (the compiled call would be bypassed) nor with forward hooks on it.
    """
    return (
        callable(getattr(type(layer), "residual", None))
        and callable(getattr(layer, "block", None))
        and _is_plain(layer)
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing but its own forward runs when the layer is called."""
    return (
        layer._compiled_call_impl is None
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _check_maps(K: Carry, h_in: Tensor, h_out: Tensor, name: str) -> None:
    """A layer that changes the state's shape needs a carry that maps one shape to the other."""
    with torch.no_grad():
        shape = None if isinstance(K, Identity) else K.vecmat(torch.zeros_like(h_out)).shape
    if shape != h_in.shape:
        kind = "the identity" if shape is None else f"one that gives shape {tuple(shape)}"
        raise ValueError(
            f"{name} maps a state of shape {tuple(h_in.shape)} to {tuple(h_out.shape)} but its "
            f"carry is {kind}; give the layer a carry(h_in, h_out) whose vecmat maps the second "
            "shape to the first"
        )


def _owned(v: Tensor, w: Tensor) -> Tensor:
    """v itself, or a copy where writing into it would also change w or repeated elements."""
    shares = v.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    expanded = any(stride == 0 and n > 1 for stride, n in zip(v.stride(), v.shape, strict=True))
    return v.clone() if shares or expanded else v
