"""`step`: call one layer of a chain; the layer continues the chain or begins a new one."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from highway_bp.containers import held_tensors, is_cache, is_filled, leaves, replaced
from highway_bp.first_order import refuse_transforms
from highway_bp.flow import Gate, Leak, Tap, is_of_chain, is_tap, watch
from highway_bp.graph_check import check_computed, check_graph, nodes
from highway_bp.has_method import Chain
from highway_bp.layer_call import Layer, run_layer
from highway_bp.one_pass import Pass
from highway_bp.recorded import recorded
from highway_bp.segment import Segment


@dataclass(frozen=True)
class Scope:
    """The tensors that require a gradient and that the layers of one pass may use.

    Attributes:
        arguments: by id, each argument of the layers, the alias that they get in its place, and
            the argument's version, which changes when the model writes into it.
        ends: nodes and edges of autograd's graph, and ids of parameters, at which a local graph may
            end.
        has_filled_cache: whether a key-value cache was not empty when the pass began.
    """

    one_pass: Pass
    gate: Gate
    arguments: dict[int, tuple[Tensor, Tensor, int]]
    ends: frozenset
    has_filled_cache: bool

    def local(self, t: Tensor) -> Tensor | None:
        """The tensor that a layer gets in place of t; None if the gradient of t would be lost."""
        if id(t) in self.arguments:
            _, alias, version = self.arguments[id(t)]
            return alias if t._version == version and not _is_elsewhere(t, alias) else None
        tap = t.grad_fn
        if not is_tap(tap) or tap.one_pass is not self.one_pass or t.output_nr == 0:
            return None
        extra = tap.extras[t.output_nr - 1]  # an earlier layer returned it beside its state
        return None if any(map(is_of_chain, nodes([extra], self.ends))) else extra

    def check_arguments(self, name: str) -> None:
        """Raise RuntimeError if a layer looks at an argument: its alias gets no gradient."""
        if any(a._backward_hooks or a.retains_grad for _, a, _ in self.arguments.values()):
            raise RuntimeError(
                f"a hook or retain_grad on an argument of {name}, set inside the layer; expected "
                "one that is set before the layers are called, or Backprop()"
            )


def step(
    chain: Chain, layer: Layer, h: Tensor, args: tuple, kwargs: dict, first: bool = False
) -> Any:
    """Run a layer of ``chain`` on the state h; returns what the layer returned.

    Args:
        first: begin a new chain, whatever h is.

    Raises:
        TypeError: the layer returns no floating tensor.
        RuntimeError: the layer changes h in place, or an argument that requires a gradient; it sets
            a hook or `retain_grad` on an argument; it uses a tensor that requires a gradient but is
            neither a parameter of the chain nor an argument; a `torch.func` transform is active.
    """
    refuse_transforms(layer.name)
    flat = leaves((args, kwargs))
    given = [t for t in flat if isinstance(t, Tensor) and t.requires_grad and t is not h]
    place = None if first else _place_in_chain(chain, layer, h, given)
    caches = [v for v in flat if is_cache(v)]
    goes_on = not first and chain.has_earlier_layers(layer)
    scope, before, segment = place or _begin_chain(chain, h, given, caches, goes_on)
    is_full = segment is None or len(segment.states) >= chain.method.group_size
    if is_full or chain.leaves_out(layer) or _is_elsewhere(h, segment.end):
        segment = Segment(Leak.apply(scope.one_pass, before), _is_wanted(scope, segment, h))
    x = segment.end
    inner = {id(h): x, **{id(t): scope.local(t) for t in given}}
    outer = {id(inner[id(t)]): t for t in [h, *given]}  # put back after the call
    for t in [h, *given]:
        inner[id(t)].__dict__ = t.__dict__  # attributes that the model or the layer sets
    without_caches = dict.fromkeys(map(id, caches))  # a second run would fill them twice
    kept = replaced((args, kwargs), inner | without_caches, copies=True)
    args, kwargs = replaced((args, kwargs), inner)
    try:
        with keep_buffers():
            call, returned = run_layer(layer, x, args, kwargs, kept, scope.has_filled_cache)
        scope.check_arguments(layer.name)
        is_skipped = returned.state is x
        if not chain.accepts(layer, x, returned) or is_skipped:
            if (leak := segment.h_in.grad_fn) is not None:
                leak.leads_on = True  # autograd goes through the layer's results itself
            return returned.with_replaced({id(x): h}) if is_skipped else returned.result.out
        segment.add(call, returned)
        check_graph(segment, -1, returned.flat, scope.ends, scope.one_pass.made)
        passed_on = _passed_on(scope, segment, before)
        outer = passed_on | outer
        return returned.with_replaced(passed_on)
    finally:
        replaced((args, kwargs, recorded()), outer)


def _is_wanted(scope: Scope, last: Segment | None, h: Tensor) -> bool:
    """Whether anything up to h gets a gradient; ``last`` is the segment that ends there."""
    if last is None:
        return h.requires_grad
    return last.wanted or bool(last.leaves) or bool(scope.arguments)


def _passed_on(scope: Scope, segment: Segment, before: Tensor) -> dict[int, Tensor]:
    """By id, the tensors that the model gets for the last layer's state and extras."""
    results = [segment.h_out, *segment.extras[-1]]
    state, *extras = Tap.apply(scope.one_pass, segment, segment.extras[-1], before)
    state.grad_fn.scope = scope
    watch(state, extras)
    for t, o in zip(results, [state, *extras], strict=True):
        o.__dict__ = t.__dict__
    return {id(t): o for t, o in zip(results, [state, *extras], strict=True)}


def _is_elsewhere(t: Tensor, alias: Tensor) -> bool:
    """Whether the memory of t was replaced since (``t.data = ...``), which changes no version."""
    return t.layout is torch.strided and _place(t) != _place(alias)


def _place(t: Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


def _begin_chain(
    chain: Chain, h: Tensor, given: Sequence[Tensor], caches: Sequence[Any], goes_on: bool
) -> tuple[Scope, Tensor, None]:
    """Begin a new chain with a Gate in front of it.

    Args:
        goes_on: whether earlier layers were called in the same pass of the model. Then a cache
            counts as filled only if it holds a chain's tensors: they have written the others.
    """
    one_pass, parameters = Pass(chain), [p for p in chain.parameters() if p.requires_grad]
    held = [one for cache in caches for one in held_tensors(vars(cache)) if one[-1].requires_grad]
    if goes_on:
        held = [(box, key, t) for box, key, t in held if is_of_chain(t.grad_fn)]
    filled = bool(held) or (not goes_on and any(map(is_filled, caches)))
    given = list({id(t): t for t in [*given, *(t for _, _, t in held)]}.values())
    before, *aliases = Gate.apply(one_pass, len(given), h, *given, *parameters)
    computed = [p for p in parameters if p.grad_fn is not None]
    one_pass.look_before([h, *given, *computed])
    arguments = {id(t): (t, a, t._version) for t, a in zip(given, aliases, strict=True)}
    edges = [(p.grad_fn, p.output_nr) for p in computed]
    check_computed(edges, parameters)
    ends = frozenset([before.grad_fn, *edges, *map(id, parameters)])
    for box, key, t in held:
        box[key] = arguments[id(t)][1]
    return Scope(one_pass, before.grad_fn, arguments, ends, filled), before, None


def _place_in_chain(
    chain: Chain, layer: Layer, h: Tensor, given: Sequence[Tensor]
) -> tuple[Scope, Tensor, Segment] | None:
    """Scope, h, segment if h is the chain's last state and all arguments are known; else None."""
    tap = h.grad_fn
    if not is_tap(tap) or h.output_nr != 0 or tap.segment is None:
        return None
    if tap.one_pass.chain is not chain or tap.number != len(tap.one_pass.all_taps):
        return None
    if any(tap.scope.local(t) is None for t in given):
        chain.warn_once(
            "break",
            f"{layer.name} gets a tensor that requires a gradient and that earlier layers did not "
            "get, or that was written into since: a new chain begins there",
        )
        return None
    return tap.scope, h, tap.segment


@contextlib.contextmanager
def keep_buffers() -> Iterator[None]:
    """Let torch.compile, where it is used, keep a backward graph's buffers for several passes."""
    config = sys.modules.get("torch._functorch.config")
    if config is None or not config.donated_buffer:
        yield
        return
    config.donated_buffer = False
    try:
        yield
    finally:
        config.donated_buffer = True
