"""A chain in autograd's graph: each layer has a local graph, and one solve treats all of them.

    h_0 -> Gate -> Leak -> layer 1 -> Tap -> h_1 -> Leak -> layer 2 -> Tap -> h_2 ...

    Gate  stands before the first layer. Its inputs are h_0 and all other tensors that get a
          gradient from the layers: arguments and parameters. Its backward runs last: it solves
          the linear system and returns the gradients of its inputs.
    Leak  begins a layer's local graph. Autograd's own backward pass goes through it if a loss
          uses a tensor inside the layer, which a hook has shown. That pass frees the local
          graph, so the layer is run once more to solve the system.
    Tap   ends the local graph: it passes on the state without this graph. Its backward notes b_i,
          the cotangent that losses send to this state.

A Tap owns its layer's local graph, which ends at the previous Tap: no cycle keeps a graph alive.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from highway_bp.auto_gamma import AutoGamma
from highway_bp.first_order import first_order
from highway_bp.graph_walk import edges_of, walk
from highway_bp.has_method import Chain, Watched
from highway_bp.module_system import ModuleSystem, States
from highway_bp.own_gradients import (
    check_own_gradients,
    layers_with_functions,
    own_gradients,
)
from highway_bp.segment import Cotangents, Segment, add, emptied, parameter_step, with_fresh_graphs
from highway_bp.shared import check_shared, shared_memory
from highway_bp.shown import add_shown, check_shown, kept_grads

# An input of every Gate. Autograd reaches this leaf unless it computes chosen gradients only.
SENTINEL = torch.zeros((), requires_grad=True)
_SENTINEL_NODE = SENTINEL.expand_as(SENTINEL).grad_fn.next_functions[0][0]
_solving = threading.local()


def solving() -> int:
    """Return how many systems this thread is solving, one nested in the other."""
    return getattr(_solving, "depth", 0)


class Pass:
    """One forward pass through a chain; it also notes which Taps a backward pass has reached.

    Attributes:
        taps: number of layers so far.
        made: ids of leaves that layers have made and returned.
        outer: ids of the backward passes within which a system is being solved that ends at this
            pass: its own, or one of a later pass.
        earlier: the passes whose chains lie behind Gate.
        functions_behind: whether custom autograd functions lie behind Gate.
    """

    def __init__(self, chain: Chain):
        self.chain, self.method = chain, Watched(chain.method, chain)
        self.taps, self.made = 0, set()
        self.outer: list[int] = []
        self.earlier: list[Pass] = []
        self.functions_behind = False
        self._task: int | None = None  # id of the backward pass that all notes are from
        self._top: weakref.ref | None = None  # of the Taps reached, the last in forward order
        self._gammas: dict[str, float] | None = None  # by layer, for gamma="auto"

    @property
    def inside(self) -> bool:
        """Whether a solve is going on around: autograd stops at this pass's Gate, Leaks and Taps.

        Another thread may bring a gradient of the outer backward pass meanwhile.
        """
        task = torch._C._current_graph_task_id()
        return any(outer != task for outer in self.outer)

    def look_behind(self, inputs: Sequence[Tensor]) -> None:
        """Find the chains and custom functions that Gate's inputs come from."""
        nearest, self.functions_behind = _behind(inputs)
        self.earlier = list(nearest | dict.fromkeys(e for one in nearest for e in one.earlier))
        self.functions_behind |= any(one.functions_behind for one in self.earlier)

    @property
    def is_reached(self) -> bool:
        """Whether the backward pass in progress has brought a gradient to one of the Taps.

        Solving another pass may also run a Tap, without a gradient, on the way to a parameter.
        """
        return self._task == torch._C._current_graph_task_id()

    def note(self, tap: Tap) -> None:
        """Note that a backward pass has reached this Tap. It reaches the last Tap first."""
        if not self.is_reached:
            self._task = torch._C._current_graph_task_id()
            self._top, self._gammas = weakref.ref(tap), None
            tap.returned = None  # set by an earlier backward pass that also reached later Taps

    def solve(self, gate: Gate) -> tuple[Tensor | None, list[Tensor | None]]:
        """Solve the system. Returns w_0 and the gradients of Gate's other inputs."""
        leaves, taps = _leaves(gate), self._taps_after(None)
        freed = not torch._C._autograd._get_current_graph_task_keep_graph()
        _check_untouched(taps, freed)
        with self._inside():
            segments, b = _segments(taps)
            suspects = layers_with_functions(segments)
            before = own_gradients(suspects)
            w = self._whole_solution(segments, b)
            _give_to_retained(taps, segments, b, w[1:])
            inner = [
                (t, segment.gradient_inside(t, w_end, b_segment))
                for segment, b_segment, w_end in zip(segments, b, w[1:], strict=True)
                for t in segment.retained
            ]
            unreached = _unreached(segments, b, w[1:])
            for tap in taps:
                tap.b, tap.b_extras = None, ()
                if freed:  # a Tap outlives its backward pass where somebody keeps the loss
                    tap.segment, tap.extras, tap.shared = None, [], []
            grads = parameter_step(segments, b, w[1:], leaves, self.functions_behind)
            check_own_gradients(before, own_gradients(suspects))
        for t, g in inner:
            t.grad = add(t.grad, None if g is None else g.clone())
        w_0 = w[0]
        if w_0 is None and gate.needs_input_grad[3]:  # no path has reached h_0
            w_0 = torch.zeros_like(gate.h)
        for i, t in enumerate(leaves):
            if grads[i] is None and id(t) in unreached:
                grads[i] = torch.zeros_like(t)
        return w_0, grads

    def _whole_solution(self, segments: Sequence[Segment], b: Sequence[Cotangents]) -> States:
        system = ModuleSystem(segments, b, self)
        self.chain.at_solve(system)
        return self.method.solve(system)

    def from_later_layers(self, tap: Tap) -> Tensor | None:
        """Return w - b at the state of ``tap``, which the backward pass has not reached yet."""
        taps = self._taps_after(tap)
        with self._inside():
            segments, b = _segments(taps)
            if taps[0].segment is not tap.segment:  # the state is the end of its group
                return self._solved(segments, b)
            w_end = add(self._solved(segments[1:], b[1:]), b[0].states[-1])
            return _inside_group(tap, segments[0], w_end, b[0])

    def _solved(self, segments: Sequence[Segment], b: Sequence[Cotangents]) -> Tensor | None:
        if not segments:
            return None
        return self.method.method.solve(ModuleSystem(segments, b, self))[0]

    def values_for(self, auto: AutoGamma, keys: Sequence[str], estimate: Callable) -> list[float]:
        """As `GammaMemory.values_for`, but the same for all systems of a backward pass."""
        if self._gammas is None:
            segments, b = _segments(self._taps_after(None))
            system = ModuleSystem(segments, b, self.chain.gammas)
            self._gammas = dict(zip(system.keys, system.smallest_blocks(auto), strict=True))
        return [self._gammas[key] for key in keys]

    def _taps_after(self, node: Tap | None) -> list[Tap]:
        """The Taps after ``node`` (None: after Gate), up to the last one that was reached."""
        taps = [self._top()]
        while is_tap(before := node_before(taps[-1])) and before is not node:
            taps.append(before)
        return taps[::-1]

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Mark this pass as being solved. Hooks on its states do not run meanwhile."""
        _solving.depth = solving() + 1
        for one in (self, *self.earlier):
            one.outer.append(torch._C._current_graph_task_id())
        try:
            taps = self._taps_after(None)
            inside = [t for tap in taps if tap.place == 0 for t in tap.segment.retained]
            with emptied(tap.hooks for tap in taps), kept_grads(inside):
                yield
        finally:
            _solving.depth = solving() - 1
            for one in (self, *self.earlier):
                one.outer.pop()


class Gate(torch.autograd.Function):
    """(h_0, arguments, parameters) -> h_0 and the arguments, as the layers see them."""

    @staticmethod
    def forward(ctx, one_pass, n_arguments, sentinel, h, *rest):
        ctx.one_pass, ctx.n, ctx.parameters = one_pass, n_arguments, rest[n_arguments:]
        ctx.h = h.detach()
        ctx.set_materialize_grads(False)
        return h.detach(), *(t.detach() for t in rest[:n_arguments])

    @first_order
    def backward(ctx, leak, *leaks):
        w_0, grads = None, [None] * (ctx.n + len(ctx.parameters))
        if ctx.one_pass.inside:
            return None, None, None, w_0, *grads
        if ctx.one_pass.is_reached:
            w_0, grads = ctx.one_pass.solve(ctx)
        grads[: ctx.n] = [add(g, leak_) for g, leak_ in zip(grads, leaks, strict=False)]
        return None, None, None, add(w_0, leak), *grads


class Leak(torch.autograd.Function):
    """h_i -> h_i, where a segment's local graph begins."""

    @staticmethod
    def forward(ctx, one_pass, h):
        ctx.one_pass = one_pass
        ctx.taps: list[weakref.ref] = []  # of its group
        ctx.set_materialize_grads(False)
        return h.detach()

    @staticmethod
    def backward(ctx, g):
        if ctx.one_pass.inside:
            return None, None
        if g is not None and any(map(_has_looked_at_state, ctx.taps[:-1])):
            refuse_inside_group()
        return None, g


class Tap(torch.autograd.Function):
    """Passes on a segment's last state and its last layer's extras, without the local graph."""

    @staticmethod
    def forward(ctx, one_pass, segment, extras, before):
        one_pass.taps += 1
        one_pass.chain.longest = max(one_pass.chain.longest, one_pass.taps)
        ctx.one_pass, ctx.segment, ctx.number = one_pass, segment, one_pass.taps
        ctx.place, ctx.extras = len(segment.states) - 1, extras
        ctx.b = ctx.returned = None
        ctx.shared = shared_memory(segment, extras)
        ctx.b_extras = ()
        ctx.set_materialize_grads(False)
        return segment.h_out.detach(), *(t.detach() for t in extras)

    @first_order
    def backward(ctx, b, *b_extras):
        is_empty = b is None and all(b_extra is None for b_extra in b_extras)
        if ctx.one_pass.inside or (is_empty and not ctx.one_pass.is_reached):
            return None, None, None, None
        if ctx.segment is None:
            raise RuntimeError(
                "Trying to backward through a chain of layers a second time: their graphs are "
                "freed. Call the first backward() with retain_graph=True"
            )
        ctx.one_pass.note(ctx)
        ctx.b, ctx.b_extras = b if ctx.returned is None else b - ctx.returned, b_extras
        before = node_before(ctx)
        if not is_tap(before):
            return None, None, None, None
        before.returned = None
        if _is_looked_at(before):
            before.returned = ctx.one_pass.from_later_layers(before)
            if before.returned is None:  # no path leads there; autograd would show a hook zeros
                before.returned = torch.zeros_like(before.segment.states[before.place])
        return None, None, None, before.returned


def _behind(inputs: Sequence[Tensor]) -> tuple[dict[Pass, None], bool]:
    """The passes of the nearest chains behind Gate; whether custom functions lie before them."""
    edges = edges_of(inputs)
    graph = walk(edges, lambda edge: is_of_chain(edge[0]))
    reached = itertools.chain(edges, *graph.values())
    passes = dict.fromkeys(node.one_pass for node, _ in reached if is_of_chain(node))
    return passes, any(isinstance(node, BackwardCFunction) for node in graph)


def is_tap(node: object) -> bool:
    return isinstance(node, Tap._backward_cls)


def is_of_chain(node: object) -> bool:
    """Whether a node of autograd's graph is one of any chain's."""
    return isinstance(node, _OF_CHAIN)


_OF_CHAIN = Tap._backward_cls, Gate._backward_cls, Leak._backward_cls


def node_before(tap: Tap) -> Tap | Gate:
    return tap.next_functions[0][0]


def watch(h: Tensor, extras: Sequence[Tensor]) -> None:
    """Let a Tap see the hooks of its state and extras, and these as long as somebody holds them."""
    h.register_hook(_unchanged).remove()  # creates the dictionary that later hooks go into
    tap = h.grad_fn
    tap.hooks, tap.state, tap.shown = h._backward_hooks, weakref.ref(h), []
    add_shown(tap.shown, extras)
    if (leak := tap.segment.h_in.grad_fn) is not None:
        leak.taps.append(weakref.ref(tap))


def _unchanged(g: Tensor) -> Tensor:
    return g


def _has_looked_at_state(ref: weakref.ref) -> bool:
    """Whether the state of a Tap has a hook or `retain_grad`."""
    tap = ref()
    state = None if tap is None else tap.state()
    return state is not None and bool(tap.hooks or state.retains_grad)


def refuse_inside_group() -> NoReturn:
    raise RuntimeError(
        "no gradient for a state inside a group of layers if a loss uses a tensor inside these "
        "layers; expected group_size=1, or Backprop()"
    )


def _is_looked_at(tap: Tap) -> bool:
    """Whether autograd may show the state's gradient to the user, who must then see w.

    The state may have hooks, or be a tensor that `torch.autograd.grad` was asked for.
    """
    explicit = not torch._C._will_engine_execute_node(_SENTINEL_NODE)
    return bool(tap.hooks) or (explicit and tap.state() is not None)


def _leaves(gate: Gate) -> list[GradientEdge | Tensor]:
    """Where the local graphs end: at Gate's outputs for the arguments, and at the parameters."""
    return [*(GradientEdge(gate, 1 + j) for j in range(gate.n)), *gate.parameters]


def _segments(taps: Sequence[Tap]) -> tuple[list[Segment], list[Cotangents]]:
    segments: list[Segment] = []
    cotangents: list[Cotangents] = []
    for tap in taps:
        if not segments or tap.segment is not segments[-1]:
            segments.append(tap.segment)
            n = len(tap.segment.states)
            cotangents.append(Cotangents([None] * n, [()] * n))
        cotangents[-1].states[tap.place] = tap.b
        cotangents[-1].extras[tap.place] = tap.b_extras
    return with_fresh_graphs(segments), cotangents


def _give_to_retained(taps, segments, b, w_ends) -> None:
    """Complete the .grad of states and extras with `retain_grad`, where autograd has put b."""
    known = iter(zip(segments, b, w_ends, strict=True))
    for tap in taps:
        if tap.place == 0:
            segment, b_segment, w_end = next(known)
        b_extras = tap.b_extras or [None] * len(tap.extras)
        for ref, inner, b_extra in zip(tap.shown, segment.extras[tap.place], b_extras, strict=True):
            extra = ref()
            if extra is not None and extra.retains_grad:
                _complete(extra, segment.gradient_inside(inner, w_end, b_segment), b_extra)
        state = tap.state()
        if state is None or not state.retains_grad or tap.returned is not None:
            continue
        is_end = tap.place == len(segment.states) - 1
        w = w_end if is_end else _inside_group(tap, segment, w_end, b_segment)
        _complete(state, w, tap.b)


def _complete(t: Tensor, whole: Tensor | None, b: Tensor | None) -> None:
    """Add to t.grad what autograd, which has put b there, has left out of the whole gradient."""
    if whole is not None:
        more = whole if b is None else whole - b
        t.grad = more.clone() if t.grad is None else t.grad + more


def _inside_group(tap, segment, w_end, b_segment) -> Tensor | None:
    """w at a state inside a group; it lacks what autograd sends through the local graph itself."""
    if tap.segment.is_used:
        refuse_inside_group()
    return segment.inner_gradient(tap.place, w_end, b_segment)


def _check_untouched(taps: Sequence[Tap], freed: bool) -> None:
    """Raise RuntimeError where a gradient would be wrong or incomplete."""
    for tap in taps:
        call = tap.segment.calls[tap.place]
        check_shared(tap.shared, call.layer.name)
        check_shown(call.shown, tap.shown, call.layer.name, freed and tap.segment.is_used)


def _unreached(segments, b, w_ends) -> set[int]:
    """Ids of the parameters of layers that no path has reached: they get zeros, as used ones do.

    Layers after all losses get no gradient, as in backpropagation.
    """
    last = max((i for i, b_i in enumerate(b) if not b_i.is_empty), default=-1)
    return {
        id(p)
        for segment, w in zip(segments[:last], w_ends, strict=False)
        if w is None
        for call in segment.calls
        for p in call.layer.module.parameters()
    }
