"""A chain in autograd's graph: each group of layers has a local graph; one solve treats all.

    h_0 -> Gate -> Leak -> layer 1 -> Tap -> h_1 -> Leak -> layer 2 -> Tap -> h_2 ...

    Gate  stands before the first layer. Its inputs are h_0 and all other tensors that get a
          gradient from the layers: arguments and parameters. Its backward runs last: it solves
          the linear system and returns the gradients of its inputs.
    Leak  begins a group's local graph. Autograd's own backward pass goes through it if a loss
          uses a tensor inside a layer, which a hook has shown. That pass frees the local
          graph, so the layers are run once more to solve the system.
    Tap   follows every layer: it passes on the state without the local graph. Its backward
          notes b_i, the cotangent that losses send to this state.

In autograd's graph a Tap leads to the Tap before it, or to Gate. It owns its group's local graph,
which ends there as well: no cycle keeps a graph alive. (The line above shows groups of one layer.)
"""

import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from highway_bp.asked import edges_of_losses
from highway_bp.first_order import first_order
from highway_bp.segment import add
from highway_bp.shown import hooks_of
from highway_bp.surroundings import version_of


class Gate(torch.autograd.Function):
    """(h_0, arguments, parameters) -> h_0 and the arguments, as the layers see them."""

    @staticmethod
    def forward(ctx, one_pass, n_arguments, h, *rest):
        ctx.one_pass, ctx.n, ctx.parameters = one_pass, n_arguments, rest[n_arguments:]
        ctx.h = h.detach()
        ctx.set_materialize_grads(False)
        return h.detach(), *(t.detach() for t in rest[:n_arguments])

    @first_order
    def backward(ctx, g_0, *g_arguments):  # what has come through Leaks
        if ctx.one_pass.is_being_solved:
            return (None,) * len(ctx.needs_input_grad)
        w_0, grads = None, [None] * (ctx.n + len(ctx.parameters))
        if ctx.one_pass.is_reached:
            w_0, grads = ctx.one_pass.solve(ctx)
        grads[: ctx.n] = map(add, grads, g_arguments)
        return None, None, add(w_0, g_0), *grads


class Leak(torch.autograd.Function):
    """h_i -> h_i, where a segment's local graph begins.

    Attributes:
        observed: for each state of its segment, a function that tells whether somebody observes
            the state, a weak reference to its Tap, and `_id_of` its node in the local graph.
        leads_on: whether a module outside the chain was given the segment's last state.
    """

    @staticmethod
    def forward(ctx, one_pass, h):
        ctx.one_pass, ctx.observed, ctx.leads_on = one_pass, [], False
        ctx.set_materialize_grads(False)
        return h.detach()

    @staticmethod
    def backward(ctx, g):
        if ctx.one_pass.is_being_solved:
            return None, None
        if g is not None and ctx.observed:
            *inner, (is_observed, ref, node) = ctx.observed
            if any(f() for f, *_ in inner) or (ctx.leads_on and is_observed()):
                refuse_inside_group()
            if is_observed() and _is_passed_by(ref(), node):
                raise RuntimeError(
                    "a hook or retain_grad on the last state of a chain, which losses use by a "
                    "tensor inside its layer alone; expected a loss on the state, or Backprop()"
                )
        return None, g


class Tap(torch.autograd.Function):
    """Passes on a segment's last state and its last layer's extras, without the local graph.

    Attributes:
        number: of this Tap in its pass, from 1; place: of its state in the segment, from 0.
        extras: inside the local graph; returned_extras: weakly, those that the model has.
        b, b_extras: the cotangents that losses send to the state and the extras.
        passed_back: w - b of the state, if the next Tap has sent it here (a hook sees it, say).
        is_unreached: whether no path leads from later losses to the state, as far as is known.
        before_hooks: what autograd has given the state's hooks, and its version.
        gave_zeros: whether that was nothing but zeros, in place of no gradient.
        is_whole: whether ``b`` is w, changed by hooks at a segment's end: later layers add nothing.
    """

    @staticmethod
    def forward(ctx, one_pass, segment, extras, before):
        ctx.one_pass, ctx.segment, ctx.number = one_pass, segment, 1 + len(one_pass.all_taps)
        one_pass.chain.longest = max(one_pass.chain.longest, ctx.number)
        ctx.place, ctx.extras = len(segment.states) - 1, extras
        if ctx.place == 0:
            segment.key = one_pass.new_key(segment.calls[0].layer.key)
        ctx.b = ctx.passed_back = ctx.before_hooks = None
        ctx.b_extras, ctx.is_whole, ctx.is_unreached, ctx.gave_zeros = (), False, False, False
        ctx.set_materialize_grads(False)
        return segment.h_out.detach(), *(t.detach() for t in extras)

    @first_order
    def backward(ctx, b, *b_extras):
        is_empty = b is None and all(b_extra is None for b_extra in b_extras)
        if ctx.one_pass.is_being_solved or (is_empty and not ctx.one_pass.is_reached):
            return None, None, None, None
        if ctx.segment is None:
            refuse_freed()
        ctx.b_extras = b_extras
        ctx.one_pass.note(ctx)
        if ctx.gave_zeros and b.any():
            raise RuntimeError(
                f"a hook on a state of {ctx.segment.calls[ctx.place].layer.name}, which no path "
                "from a loss reaches, changes zeros (a division by their norm?); expected one that "
                "leaves zeros, or Backprop()"
            )
        # Not b - passed_back where a hook has clipped, say: little is left of a small difference.
        is_end = ctx.passed_back is not None and ctx.place == len(ctx.segment.states) - 1
        ctx.is_whole = is_end and ctx.before_hooks is not None and _is_changed(b, *ctx.before_hooks)
        ctx.b = b if ctx.passed_back is None or ctx.is_whole else b - ctx.passed_back
        ctx.before_hooks, before = None, node_before(ctx)
        if not is_tap(before):
            return None, None, None, None
        before.passed_back, before.is_unreached = None, False
        if has_hooks(before):
            ctx.one_pass.check_hooks(before)
        if has_hooks(before) or ctx.one_pass.gives_out(before, 0):
            before.passed_back = ctx.one_pass.from_later_layers(before)
            before.is_unreached = before.passed_back is None
            if before.is_unreached:  # autograd would show a hook zeros
                before.passed_back = torch.zeros_like(before.segment.states[before.place])
        # A hook may write into the gradient that it is shown.
        return None, None, None, None if before.passed_back is None else before.passed_back.clone()


class Refused(torch.autograd.Function):
    """Passes on the first n of some tensors; raises ``line`` if a gradient comes back to them.

    The other tensors make autograd come here, whichever gradients it is asked for. During a solve
    (``is_solving()``) it comes for no loss of the user's, and nothing is raised.
    """

    @staticmethod
    def forward(ctx, line, is_solving, n, *tensors):
        ctx.line, ctx.is_solving = line, is_solving
        ctx.one_pass = None  # `check_shown` sees by it that the tensors were given to the layer
        return tuple(t.detach() for t in tensors[:n])

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.is_solving():
            raise RuntimeError(ctx.line)
        return (None,) * len(ctx.needs_input_grad)


def is_tap(node: object) -> bool:
    return isinstance(node, Tap._backward_cls)


def is_of_chain(node: object) -> bool:
    """Whether a node of autograd's graph is one of any chain's."""
    return isinstance(node, _OF_CHAIN)


_OF_CHAIN = Tap._backward_cls, Gate._backward_cls, Leak._backward_cls


def node_before(tap: Tap) -> Tap | Gate:
    return tap.next_functions[0][0]


def watch(h: Tensor, extras: Sequence[Tensor]) -> None:
    """Let the Tap of a state and its extras find them, as long as somebody holds them."""
    tap = h.grad_fn
    ref = weakref.ref(tap)
    # Autograd runs this hook for any of the Tap's outputs, also where it does not run the Tap.
    h.register_hook(unserializable_hook(lambda g: _look_at(ref(), g)))
    tap.hooks, tap.state = h._backward_hooks, weakref.ref(h)
    tap.one_pass.all_taps.append(weakref.ref(tap))
    tap.returned_extras = list(map(weakref.ref, extras))
    tap.hooks_of_extras = list(map(hooks_of, extras))
    if (leak := tap.segment.h_in.grad_fn) is not None:
        tap.observers = _Observers(tap.state, tap.hooks)
        node = tap.segment.h_out.grad_fn
        leak.observed.append((tap.observers.are_there, ref, node and _id_of(node)))


def _is_changed(g: Tensor, before: Tensor, version: int | None) -> bool:
    """Whether a hook has returned another gradient than it was given, or written into that."""
    return g is not before or version_of(g) != version


def _look_at(tap: Tap | None, g: Tensor | None) -> None:
    """Check what autograd gives out at ``tap``; or else its state was detached in place since."""
    if tap is None:
        return
    state = tap.state()
    is_detached = state is not None and state.grad_fn is None
    runs = torch._C._will_engine_execute_node(tap)
    if is_detached and not runs:
        return
    if is_detached and has_hooks(tap) and tap.segment is not None:
        raise RuntimeError(
            f"a state of {tap.segment.calls[tap.place].layer.name} was detached in place and has "
            "hooks, which would run for both; expected detach(), or Backprop()"
        )
    if runs:
        tap.before_hooks = None if g is None else (g, version_of(g))
        tap.gave_zeros = g is not None and tap.is_unreached and not g.any()
    tap.one_pass.check_given(tap)


def will_solve(tap: Tap) -> bool:
    """Whether the backward pass in progress goes as far as the Gate of the Tap's chain."""
    return torch._C._will_engine_execute_node(tap.scope.gate)


def _id_of(node: object) -> tuple[str, int]:
    """In place of a node of autograd's graph, where a reference would close a cycle."""
    return node.name(), node._sequence_nr()


def _is_passed_by(tap: Tap | None, of_node: tuple[str, int] | None) -> bool:
    """Whether the backward pass in progress uses a Tap's state in the local graph alone.

    Args:
        tap: None if it has gone, and with it all other uses.
        of_node: `_id_of` the state's node in the local graph; None without one.
    """
    runs = torch._C._will_engine_execute_node
    if of_node is None or (tap is not None and runs(tap)):
        return False
    nodes = (node for node, _ in edges_of_losses() if node is not None)
    return any(_id_of(node) == of_node and runs(node) for node in nodes)


def has_hooks(tap: Tap) -> bool:
    """Whether its state has hooks beside that of `watch`."""
    return len(tap.hooks) > 1


class _Observers:
    """Who observes a state: a hook beside that of `watch`, or `retain_grad`.

    The Tap holds this object. The Leak holds ``are_there`` alone, as hooks may hold tensors of the
    Leak's own graph.

    are_there: a function; after this object's end it tells whether there were hooks.
    """

    def __init__(self, state: weakref.ref, hooks: dict):
        self.state, self.hooks, had_hooks = state, hooks, []
        self.had_hooks, alive = had_hooks, weakref.ref(self)
        self.are_there = lambda: bool(had_hooks) if alive() is None else alive()._are_there_now

    @property
    def _are_there_now(self) -> bool:
        state = self.state()
        return len(self.hooks) > 1 or (state is not None and state.retains_grad)

    def __del__(self):
        self.had_hooks += [True] * (len(self.hooks) > 1)


def refuse_freed() -> NoReturn:
    raise RuntimeError(
        "Trying to backward through a chain of layers a second time: their graphs are freed. Call "
        "the first backward() with retain_graph=True"
    )


def refuse_inside_group() -> NoReturn:
    raise RuntimeError(
        "no gradient for a state inside a group of layers if a loss uses a tensor inside these "
        "layers; expected group_size=1, or Backprop()"
    )
