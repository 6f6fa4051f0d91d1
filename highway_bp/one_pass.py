"""One forward pass through a chain, and how its system is solved in the backward pass."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from highway_bp.asked import asked_for, is_split
from highway_bp.auto_gamma import AutoGamma
from highway_bp.flow import (
    Gate,
    Tap,
    has_hooks,
    is_of_chain,
    is_tap,
    node_before,
    refuse_freed,
    will_solve,
)
from highway_bp.graph_walk import edges_of, walk
from highway_bp.has_method import Chain, CountedMethod
from highway_bp.looked_at import (
    at_state,
    check_given_extra,
    check_retained,
    check_state,
    complete_retained,
    refuse_computed_from_state,
    refuse_if_used,
    used_extras,
)
from highway_bp.methods import TruncatedBPTT
from highway_bp.module_system import ModuleSystem, States
from highway_bp.on_the_way import Way
from highway_bp.own_gradients import refuse_own_gradients
from highway_bp.post_hooks import only_where_gradients_arrive
from highway_bp.segment import Cotangents, Segment, add, parameter_step, with_fresh_graphs
from highway_bp.shown import check_shown, hooks_of, kept_grads
from highway_bp.silenced import silenced

_solving = threading.local()


def solving() -> int:
    """Return how many systems this thread is solving, one nested in the other."""
    return getattr(_solving, "depth", 0)


class Pass:
    """One forward pass through a chain; it also notes which Taps a backward pass has reached.

    Attributes:
        made: ids of leaves that layers have made and returned.
        all_taps: weak references to the Taps of all layers so far.
        hooks_before: the dictionaries of the hooks on Gate's inputs that are no leaves.
        outer: ids of the backward passes that are solving this pass, or a later one, now; the
            products of that solve stop at this pass's nodes.
        earlier: the passes whose chains lie before Gate.
        functions_before: whether custom autograd functions lie before Gate.
    """

    def __init__(self, chain: Chain):
        self.chain, self.method = chain, CountedMethod(chain.method, chain)
        self.made: set[int] = set()
        self._uses: Counter[str] = Counter()  # of layers, by key
        self.all_taps: list[weakref.ref] = []
        self.hooks_before: list[dict] = []
        self.outer: list[int] = []
        self.earlier: list[Pass] = []
        self.functions_before = False
        self._task: int | None = None  # id of the backward pass that all notes are from
        self._tasks: set[int] = set()  # ids of all that have left notes
        self._top: weakref.ref | None = None  # of the Taps reached, the last in forward order
        self._gammas: dict[str, float] | None = None  # by layer, for gamma="auto"
        self._asked: set[tuple[int, int]] | None = None  # (number of a Tap, of its output)
        self._asked_in: int | None = None  # id of the backward pass that was asked for them

    def new_key(self, key: str) -> str:
        """A key for a segment that begins with the layer of this key."""
        n = self._uses[key]
        self._uses[key] += 1
        return f"{key}+{n}" if n else key

    @property
    def is_being_solved(self) -> bool:
        """Whether the running backward pass is a product of a solve, which stops at this pass's
        Gate, Leaks and Taps. Another thread may go on with the outer backward pass meanwhile."""
        task = torch._C._current_graph_task_id()
        return any(outer != task for outer in self.outer)

    def look_before(self, inputs: Sequence[Tensor]) -> None:
        """Find the chains and custom functions that Gate's inputs come from, and their hooks."""
        self.hooks_before = [hooks_of(t) for t in inputs if t.grad_fn is not None]
        nearest, self.functions_before = _before(inputs)
        self.earlier = list(nearest | dict.fromkeys(e for one in nearest for e in one.earlier))
        self.functions_before |= any(one.functions_before for one in self.earlier)

    @property
    def is_reached(self) -> bool:
        """Whether the backward pass in progress has brought a gradient to one of the Taps.

        Solving another pass may also run a Tap, without a gradient, on the way to a parameter.

        Raises:
            RuntimeError: it has, but another backward pass has come in between.
        """
        task = torch._C._current_graph_task_id()
        if task != self._task and task in self._tasks:
            raise RuntimeError(
                "a backward pass through a chain was interrupted by another one through the same "
                "chain, from a hook, say; expected one after the other, or Backprop()"
            )
        return task == self._task

    def note(self, tap: Tap) -> None:
        """Note that a backward pass has reached this Tap. It reaches the last Tap first."""
        if not self.is_reached:
            self._task = torch._C._current_graph_task_id()
            self._tasks.add(self._task)
            self._top, self._gammas = weakref.ref(tap), None
            tap.passed_back = None  # set by an earlier backward pass that also reached later Taps
            if has_hooks(tap):
                self.check_hooks(tap)
                pairs = zip(tap.extras, tap.b_extras, strict=True)
                check_state(tap, [extra for extra, b in pairs if b is not None])

    def gives_out(self, tap: Tap, i: int) -> bool:
        """Whether autograd alone gives the user the gradient at the i-th output of ``tap``: it was
        asked for, or `retain_grad` was called and no solve will complete it.

        If autograd was called from C++, any state that somebody holds may have been asked for.
        """
        task = torch._C._current_graph_task_id()
        if self._asked_in != task:
            self._asked_in, self._asked = task, asked_for()
            if self._asked is not None:
                own = [(n, j) for n, j in self._asked if is_tap(n) and n.one_pass is self]
                self._asked = {(n.number, j) for n, j in own}
        t = [tap.state, *tap.returned_extras][i]()
        if self._asked is None and i == 0:
            return t is not None
        if self._asked and (tap.number, i) in self._asked:
            return True
        return self._is_filled(tap, t) and (tap, i) in Way()

    @staticmethod
    def _is_filled(tap: Tap, t: Tensor | None) -> bool:
        """Whether autograd alone fills the .grad of t, an output of ``tap``."""
        return t is not None and t.retains_grad and not will_solve(tap)

    def check_hooks(self, tap: Tap) -> None:
        """Raise RuntimeError if hooks on the state of ``tap`` would run where plain autograd would
        not go."""
        if (tap, 0) not in Way():
            raise RuntimeError(
                "gradients of some tensors alone (autograd.grad, backward(inputs=...)), and a hook "
                f"on a state of {tap.segment.calls[tap.place].layer.name} that leads to none of "
                "them; expected backward() without inputs, or Backprop()"
            )

    def check_given(self, tap: Tap) -> None:
        """Raise RuntimeError if autograd gives out a gradient at ``tap`` that is incomplete, or of
        which nobody knows whether the state's hooks have changed it."""
        if self.is_being_solved:
            return
        if tap.segment is None:  # freed; a state alone needs no graph behind it
            if tap.returned_extras:
                refuse_freed()
            return
        if has_hooks(tap) and not self.is_reached:  # before a hook gets None
            check_state(tap, used_extras(tap))
        for i, ref in enumerate([tap.state, *tap.returned_extras]):
            if self._is_filled(tap, ref()):
                check_retained(tap, i)
        for j in range(len(tap.extras)):
            if self.gives_out(tap, 1 + j):
                check_given_extra(tap, j)
        if not self.gives_out(tap, 0):
            return
        if has_hooks(tap) and will_solve(tap) and self._asked is not None:
            raise RuntimeError(
                "autograd.grad of a state that has hooks, and of others: it may give the gradient "
                "before the hooks or after; expected retain_grad and backward(), or Backprop()"
            )
        if not self.is_reached:  # no later layers
            check_state(tap, used_extras(tap))

    def solve(self, gate: Gate) -> tuple[Tensor | None, list[Tensor | None]]:
        """Solve the system. Returns w_0 and the gradients of Gate's other inputs."""
        if is_split():
            raise RuntimeError(
                "a pipeline's backward pass in two parts (a zero-bubble schedule), the second of "
                "which does not come to a chain; expected another schedule, or Backprop()"
            )
        arguments = (GradientEdge(gate, 1 + j) for j in range(gate.n))
        leaves, taps = [*arguments, *gate.parameters], self._taps_after(None)
        freed = not torch._C._autograd._get_current_graph_task_keep_graph()
        _check_untouched(taps, freed)
        with self._being_solved():
            segments, b = _segments(taps)
            suspects = [call.layer for s in segments if s.functions for call in s.calls]
            with refuse_own_gradients(suspects):
                w = self._solve_whole(segments, b)
                inner = complete_retained(taps, segments, b, w[1:])
                unreached = _unreached(segments, b, w[1:])
                for tap in taps:
                    tap.b, tap.b_extras = None, ()
                    if freed:  # a Tap outlives its backward pass where somebody keeps the loss
                        tap.segment, tap.extras = None, []
                grads = parameter_step(segments, b, w[1:], leaves, self.functions_before)
        for t, g in inner:
            t.grad = add(t.grad, None if g is None else g.clone())
        w_0 = w[0]
        if w_0 is None and gate.needs_input_grad[2]:  # no path has reached h_0
            w_0 = torch.zeros_like(gate.h)
        for i, t in enumerate(leaves):
            if grads[i] is None and id(t) in unreached:
                grads[i] = torch.zeros_like(t)
        only_where_gradients_arrive(gate.parameters, grads[gate.n :])
        return w_0, grads

    def _solve_whole(self, segments: Sequence[Segment], b: Sequence[Cotangents]) -> States:
        self.chain.refuse_unrepeatable(segments)
        w: States = []
        for part in _parts(segments, b):
            system = ModuleSystem(*part, self)  # it holds the segments, which are freed later
            self.chain.at_solve(system)
            w += self.method.solve(system)[1 if w else 0 :]
        return w

    def from_later_layers(self, tap: Tap) -> Tensor | None:
        """Return w - b at the state of ``tap``, which the backward pass has not reached yet."""
        taps = self._taps_after(tap)
        freed = not torch._C._autograd._get_current_graph_task_keep_graph()
        _check_untouched(taps, freed)
        with self._being_solved():
            segments, b = _segments(taps)
            refuse_computed_from_state(tap, tap.extras)
            if taps[0].segment is not tap.segment:  # the state is the end of its group
                refuse_if_used(tap, tap.segment.h_out)
                return self._w_at_start(segments, b)
            w_end = b[0].states[-1]
            if not b[0].is_whole:
                w_end = add(self._w_at_start(segments[1:], b[1:]), w_end)
            return at_state(tap, segments[0], b[0], w_end)

    def _w_at_start(self, segments: Sequence[Segment], b: Sequence[Cotangents]) -> Tensor | None:
        if not segments or isinstance(self.method.method, TruncatedBPTT):
            return None  # nothing goes from one window to another
        self.chain.refuse_unrepeatable(segments)
        nearest = next(_parts(segments, b))
        return self.method.method.solve(ModuleSystem(*nearest, self))[0]

    def values_for(self, auto: AutoGamma, keys: Sequence[str], estimate: Callable) -> list[float]:
        """As `GammaMemory.values_for`, but from one estimate per backward pass, of all layers."""
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
    def _being_solved(self) -> Iterator[None]:
        """Mark this pass as being solved. Hooks on its states, and on those behind Gate, do not run
        meanwhile."""
        passes = (self, *self.earlier)
        _solving.depth = solving() + 1
        for one in passes:
            one.outer.append(torch._C._current_graph_task_id())
        try:
            taps = self._taps_after(None)
            retained = [t for tap in taps if tap.place == 0 for t in tap.segment.retained]
            refs = itertools.chain(*(one.all_taps for one in passes))
            hooks = [tap.hooks for ref in refs if (tap := ref()) is not None]
            hooks += itertools.chain(*(one.hooks_before for one in passes))
            with silenced(hooks), kept_grads(retained):
                yield
        finally:
            _solving.depth = solving() - 1
            for one in passes:
                one.outer.pop()


def _before(inputs: Sequence[Tensor]) -> tuple[dict[Pass, None], bool]:
    """The passes of the nearest chains before Gate; whether custom functions lie between."""
    edges = edges_of(inputs)
    graph = walk(edges, lambda edge: is_of_chain(edge[0]))
    reached = itertools.chain(edges, *graph.values())
    passes = dict.fromkeys(node.one_pass for node, _ in reached if is_of_chain(node))
    return passes, any(isinstance(node, BackwardCFunction) for node in graph)


def _segments(taps: Sequence[Tap]) -> tuple[list[Segment], list[Cotangents]]:
    segments: list[Segment] = []
    cotangents: list[Cotangents] = []
    for tap in taps:
        if not segments or tap.segment is not segments[-1]:
            segments.append(tap.segment)
            n = len(tap.segment.states)
            cotangents.append(Cotangents([None] * n, [()] * n))
        cotangents[-1].states[tap.place] = tap.b
        cotangents[-1].is_whole = tap.is_whole  # in the end, of the last one
        cotangents[-1].extras[tap.place] = tap.b_extras
    return with_fresh_graphs(segments), cotangents


def _parts(
    segments: Sequence[Segment], b: Sequence[Cotangents]
) -> Iterator[tuple[Sequence[Segment], Sequence[Cotangents]]]:
    """Cut the chain behind each state whose whole gradient is known."""
    cuts = [i + 1 for i, of in enumerate(b[:-1]) if of.is_whole]
    for start, end in itertools.pairwise([0, *cuts, len(b)]):
        yield segments[start:end], b[start:end]


def _check_untouched(taps: Sequence[Tap], freed: bool) -> None:
    """Raise RuntimeError where a gradient would be wrong or incomplete."""
    for tap in taps:
        call = tap.segment.calls[tap.place]
        call.check_shared()
        is_used = (freed and tap.segment.is_used) or not will_solve(tap)
        check_shown(call.shown, tap.hooks_of_extras, call.layer.name, is_used)


def _unreached(
    segments: Sequence[Segment], b: Sequence[Cotangents], w_ends: Sequence[Tensor | None]
) -> set[int]:
    """Ids of the parameters of layers before the last loss that no path has reached: they get
    zeros. Layers after all losses get None. Backpropagation makes the same difference.
    """
    last = max((i for i, b_i in enumerate(b) if not b_i.is_empty), default=-1)
    return {
        id(p)
        for segment, w in zip(segments[:last], w_ends, strict=False)
        if w is None
        for call in segment.calls
        for p in call.layer.module.parameters()
    }
