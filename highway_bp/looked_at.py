"""Gradients of tensors that somebody looks at, by `retain_grad`, a hook or `autograd.grad`.

To what a layer returned (its state, its extras), autograd itself brings b alone, from the losses
that use it directly. The rest comes from the local graphs: the layer's own, and those of other
layers that get an extra.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from highway_bp.asked import edges_of_losses
from highway_bp.flow import Tap, is_of_chain, is_tap, will_solve
from highway_bp.graph_walk import edges_of, walk
from highway_bp.on_the_way import Way
from highway_bp.segment import Cotangents, Segment, gradient_at


def complete_retained(
    taps: Sequence[Tap],
    segments: Sequence[Segment],
    b: Sequence[Cotangents],
    w_ends: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor | None]]:
    """Complete the .grad of all results with `retain_grad`, where plain autograd would go.

    Returns:
        the tensors inside layers with `retain_grad`, and what their .grad lacks.
    """
    system, way, i = (segments, b, w_ends), Way(), -1
    for tap in taps:
        if tap.place == 0:  # the next segment begins
            i += 1
        for j, ref in enumerate(tap.returned_extras):
            extra = ref()
            if extra is None or not extra.retains_grad:
                continue
            b_extra = tap.b_extras[j] if tap.b_extras else None
            if (tap, 1 + j) in way:
                check_extra(tap, j)
                whole = gradient_at(segments[i].extras[tap.place][j], *system)
                _complete(extra, whole, b_extra)
            else:
                _check_none(tap, b_extra)
        state = tap.state()
        if state is None or not state.retains_grad or tap.passed_back is not None:
            continue
        if (tap, 0) in way:
            _complete(state, at_state(tap, segments[i], b[i], w_ends[i]), tap.b)
        else:
            _check_none(tap, tap.b)
    retained = {id(t): t for segment in segments for t in segment.retained}  # lists may be shared
    inside = (t for t in retained.values() if (t.grad_fn, t.output_nr) in way)
    return [(t, gradient_at(t, *system)) for t in inside]


def check_retained(tap: Tap, i: int) -> None:
    """Raise RuntimeError if autograd, in a pass without a solve, fills the .grad of the i-th output
    of ``tap`` where plain autograd would not go."""
    # The next layer's Tap leads to this state, too, and is no loss.
    by_losses = edges_of_losses(of=lambda node: not is_tap(node))
    if (tap, i) in by_losses and (tap, i) not in Way():
        _refuse(tap, "leads to no gradient that was asked for")


def _check_none(tap: Tap, b: Tensor | None) -> None:
    """Raise RuntimeError if autograd has put b where plain autograd would not go."""
    if b is not None:
        _refuse(tap, "leads to no gradient that was asked for")


def at_state(tap: Tap, segment: Segment, b: Cotangents, w_end: Tensor | None) -> Tensor | None:
    """The whole gradient at the state of ``tap``, from w at its segment's end; None for zero.

    Raises:
        RuntimeError: autograd itself goes through the local graph at this state.
    """
    state = segment.states[tap.place]
    refuse_if_used(tap, tap.segment.states[tap.place])
    if state is segment.h_out and not segment.extras[tap.place]:
        return w_end
    return gradient_at(state, [segment], [b], [w_end])


def check_state(tap: Tap, extras: Sequence[Tensor]) -> None:
    """Raise RuntimeError if b is not the whole gradient at the state of ``tap``: losses reach it
    inside the layer too, or by one of these extras. No later layer has a gradient."""
    refuse_if_used(tap, tap.segment.states[tap.place])
    refuse_computed_from_state(tap, extras)


def refuse_computed_from_state(tap: Tap, extras: Sequence[Tensor]) -> None:
    """Raise RuntimeError if one of these extras was computed from the state of ``tap``: its
    gradient is a part of the state's."""
    state, name = tap.segment.states[tap.place], tap.segment.calls[tap.place].layer.name
    own = tap.one_pass  # a chain inside the layer may lie between the state and an extra
    graph = walk(edges_of(extras), lambda e: is_of_chain(e[0]) and e[0].one_pass is own)
    if state.grad_fn in graph:
        raise RuntimeError(
            f"{name} returns a tensor that it has computed from its state, whose gradient somebody "
            "looks at; expected retain_grad on the state, or Backprop()"
        )


def check_extra(tap: Tap, j: int) -> None:
    """Raise RuntimeError if the gradient of the j-th extra cannot be given in full."""
    refuse_if_used(tap, tap.extras[j])
    if is_of_chain(tap.extras[j].grad_fn):
        _refuse(tap, "comes from a chain inside the layer")


def used_extras(tap: Tap) -> list[Tensor]:
    """The extras of ``tap`` that the losses use."""
    edges = edges_of_losses()
    return [extra for j, extra in enumerate(tap.extras) if (tap, 1 + j) in edges]


def check_given_extra(tap: Tap, j: int) -> None:
    """Raise RuntimeError if other results that the losses use depend on the j-th extra of ``tap``:
    autograd, which gives its gradient out, lacks their share."""
    check_extra(tap, j)
    taps = ((n, i) for n, i in edges_of_losses() if is_tap(n) and n.one_pass is tap.one_pass)
    others = [
        node.extras[i - 1] if i else node.segment.states[node.place]
        for node, i in taps
        if node.number >= tap.number and (node, i) != (tap, 1 + j)
    ]
    graph = walk(edges_of(others), lambda edge: is_of_chain(edge[0]))
    if any(node in graph for node, _ in edges_of([tap.extras[j]])):
        raise RuntimeError(
            "autograd alone has a part of the gradient of what "
            f"{tap.segment.calls[tap.place].layer.name} returned beside its state; expected "
            "retain_grad and loss.backward(), or Backprop()"
        )


def refuse_if_used(tap: Tap, inner: Tensor) -> None:
    """Refuse a look at a result that losses reach through the local graph as well."""
    node = inner.grad_fn
    if node is None:
        return
    is_used = torch._C._will_engine_execute_node(node)
    if not is_used and not will_solve(tap):  # autograd leaves out what leads to no gradient
        is_used = any(node is other for other, _ in edges_of_losses())
    if is_used:
        _refuse(tap, "leads to a tensor inside the layer that a loss uses")


def _refuse(tap: Tap, why: str) -> None:
    raise RuntimeError(
        f"a look at the gradient of what {tap.segment.calls[tap.place].layer.name} returned, which "
        f"{why}: a chain does not have all of it; expected Backprop()"
    )


def _complete(t: Tensor, whole: Tensor | None, b: Tensor | None) -> None:
    """Add to t.grad what autograd, which has put b there, has left out of the whole gradient."""
    if whole is not None:
        more = whole if b is None else whole - b
        t.grad = more.clone() if t.grad is None else t.grad + more
