"""`Segment`: consecutive layers with one local autograd graph, which gives products with J."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from highway_bp.carry import Carry, Identity, as_carry
from highway_bp.layer_call import Call, Returned
from highway_bp.shown import kept_grads, retained
from highway_bp.silenced import silenced

TOGETHER = 4  # segments that share one call of autograd's engine; each needs memory for a state


@dataclass
class Cotangents:
    """The cotangents that losses send to a segment's states, and to its layers' extras."""

    states: list[Tensor | None]
    extras: list[Sequence[Tensor | None]]  # of each layer
    is_whole: bool = False  # that of the last state is w: later layers add nothing

    @property
    def is_empty(self) -> bool:
        return all(b is None for b in [*self.states, *(b for of in self.extras for b in of)])


@dataclass
class Segment:
    """Layers a+1 .. e with their local graph, which begins at h_a and is kept for the backward.

    Attributes:
        h_in: h_a, from a Leak, which notices autograd's own pass (none in a `ShardedChain`).
        wanted: whether w is wanted at h_a.
        states: h_{a+1} .. h_e, attached to the local graph.
        calls, carries: for each layer, its call and its carry function (None: the identity).
        extras: for each layer, its other outputs that require a gradient.
        is_cut: whether the graph holds the path through the block alone.
        ends: the nodes of the local graph that lead to a leaf, or out of this graph.
        leaves: ids of the parameters, and edges of the arguments, that its graph uses.
        functions: the names of the custom autograd functions among its nodes.
        key: under which the chain stores its gamma, another one for every segment of a pass.
        is_repeated: whether it is run once more, as autograd has gone through the first graph.
    """

    h_in: Tensor
    wanted: bool
    states: list[Tensor] = field(default_factory=list)
    extras: list[list[Tensor]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    carries: list[Callable | None] = field(default_factory=list)
    is_cut: bool = False
    ends: list = field(default_factory=list)
    leaves: set = field(default_factory=set)
    functions: frozenset[str] = frozenset()
    key: str = ""
    is_repeated: bool = False

    def add(self, call: Call, returned: Returned) -> None:
        """Append a layer; TypeError if it returned no state."""
        if returned.state is None:
            raise TypeError(
                f"{call.layer.name} returned no floating tensor; expected the state, or Backprop()"
            )
        self.states.append(returned.state)
        self.extras.append(returned.extras)
        self.calls.append(call)
        self.carries.append(returned.result.carry)
        self.is_cut = returned.result.is_cut

    @property
    def h_out(self) -> Tensor:
        return self.states[-1]

    @property
    def end(self) -> Tensor:
        """The state that the next layer of the segment gets."""
        return self.states[-1] if self.states else self.h_in

    def repeated(self, extras: dict[int, Tensor]) -> Segment:
        """Run the same layers once more; adds the new extras to ``extras``, by id of the old."""
        with torch.inference_mode(False), torch.enable_grad():
            # Carries look for a node where the local graph begins.
            h_in = self.h_in.detach().requires_grad_().view_as(self.h_in)
            segment = Segment(h_in, self.wanted, is_repeated=True)
            segment.functions, segment.leaves = self.functions, self.leaves
            segment.key = self.key
            for call, old in zip(self.calls, self.extras, strict=True):
                segment.add(call, call.repeat(segment.end, extras))
                extras.update(zip(map(id, old), segment.extras[-1], strict=True))
        return segment

    @property
    def is_used(self) -> bool:
        """Whether the backward pass in progress goes through the local graph itself."""
        return any(map(torch._C._will_engine_execute_node, self.ends))

    def vjp(self, w: Tensor) -> Tensor | None:
        """w J (``is_cut``) or w (J + K), a tensor that may be written into; None for zero."""
        return vjps([self], [w])[0]

    def through(self, w: Tensor, block: float, carry: float) -> Tensor | None:
        """w (block J + carry K); None for zero. May be written into, unless it is w itself."""
        return self.weighted(w, self.vjp(w) if block else None, block, carry)

    def weighted(self, w: Tensor, v: Tensor | None, block: float, carry: float) -> Tensor | None:
        """As `through`, computed from v = `vjp` of w; overwrites v."""
        if v is not None and block != 1:
            v = v.mul_(block)
        # The graph gives w J or w (J + K); the difference from the result is a multiple of w K.
        share = carry if self.is_cut else carry - block
        return self.K.accumulate_(v, w, share) if share != 0 else v

    def inner_cotangent(self, b: Cotangents) -> Tensor | None:
        """The cotangent that losses on the segment's inner states and extras send to h_a."""
        return gradients(self.pairs(b, None), [self.h_in])[0] if self.wanted else None

    @property
    def retained(self) -> list[Tensor]:
        """The tensors inside its layers that have `retain_grad`."""
        return [t for call in self.calls for t in retained(call.shown)]

    def pairs(self, b: Cotangents, w: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """(output, cotangent) of the segment's layers; w belongs to the last state.

        Outputs without a cotangent are left out."""
        found = list(zip(self.states, [*b.states[:-1], w], strict=True))
        for extras, b_extras in zip(self.extras, b.extras, strict=True):
            found += zip(extras, b_extras, strict=bool(b_extras))
        return [(out, self.given(c)) for out, c in found if c is not None and out.requires_grad]

    def given(self, c: Tensor) -> Tensor:
        """A cotangent as the local graph gets it: a copy if a custom function may write into it."""
        return c.clone() if self.functions else c

    @cached_property
    def K(self) -> Carry:
        """The carry of the segment, K_e ... K_{a+1}, computed on first use."""
        K: Carry = Identity()
        for i in reversed(range(len(self.calls))):
            K = K @ self._carry_of_layer(i)
        return K

    def _carry_of_layer(self, i: int) -> Carry:
        h_in = (self.states[i - 1] if i else self.h_in).detach()
        h_out, call = self.states[i].detach(), self.calls[i]
        with call.surroundings.autocast:
            given = None if self.carries[i] is None else self.carries[i](h_in, h_out)
        K = as_carry(given, h_out, call.layer.name)
        if h_in.shape != h_out.shape:
            _check_maps(K, h_in, h_out, call.layer.name)
        return K


def vjps(segments: Sequence[Segment], w: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`Segment.vjp` of each, in one call of autograd's engine: segments share no graph."""
    found: list[Tensor | None] = [None] * len(segments)
    known = [i for i, s in enumerate(segments) if s.wanted and w[i] is not None]
    wanted = [i for i in known if segments[i].h_out.requires_grad]
    pairs = [(segments[i].h_out, segments[i].given(w[i])) for i in wanted]
    products = gradients(pairs, [segments[i].h_in for i in wanted])
    for i, v in zip(wanted, products, strict=True):
        found[i] = None if v is None else _owned(v, w[i], bool(segments[i].functions))
    return found


def gradient_at(
    t: Tensor,
    segments: Sequence[Segment],
    b: Sequence[Cotangents],
    w_ends: Sequence[Tensor | None],
) -> Tensor | None:
    """The gradient of a tensor in these local graphs, from w at the end of each; None for zero."""
    return gradients(_pairs(segments, b, w_ends), [t])[0]


def parameter_step(
    segments: list[Segment],
    b: Sequence[Cotangents],
    w: Sequence[Tensor | None],
    leaves: Sequence,
    functions_before: bool = False,
) -> list[Tensor | None]:
    """w_i df_i/dtheta_i of all layers, a few segments per call of autograd's engine.

    Takes the segments out of the list: the graphs that nobody else holds are freed on the way.

    Args:
        w: at the end of each segment.
        leaves: parameters, and gradient edges of arguments. Hooks on them do not run here.
        functions_before: see `one_pass.Pass`.

    Returns:
        the gradient of each leaf; None if no layer uses it.
    """
    grads: list[Tensor | None] = [None] * len(leaves)
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    frozen = {id(t) for t in tensors if not t.requires_grad}  # since the forward pass
    places = {_key_of(t): i for i, t in enumerate(leaves) if id(t) not in frozen}
    hooks = (t._backward_hooks for t in tensors)
    retaining = (t for t in tensors if t.retains_grad)
    # Memory in use: at k = 0, several layers share one w. Gradients that lie there are copied.
    in_use = {_memory(t) for t in w if t is not None}
    # Hooks run, and .grad is filled, when these gradients leave the chain.
    with silenced(hooks), kept_grads(retaining):
        while segments:
            # A custom function may return the same memory for each layer's gradients.
            n = 1 if any(s.functions for s in segments[-TOGETHER:]) else TOGETHER
            some = segments[-n:]
            del segments[-n:]
            here = slice(len(segments), len(segments) + len(some))
            # Autograd takes time for each input, so each call gets those alone that it needs.
            used = set().union(*(segment.leaves for segment in some))
            wanted = sorted(places[key] for key in used if key in places)
            inputs = [leaves[i] for i in wanted]
            pairs = _pairs(some, b[here], w[here])
            found = gradients(pairs, inputs)
            if functions_before and pairs:
                found = list(map(_less, found, _from_before(some, inputs)))
            for i, g in zip(wanted, found, strict=True):
                is_own = g is None or not (some[0].functions or _memory(g) in in_use)
                grads[i] = add(grads[i], g if is_own or grads[i] is not None else g.clone())
                if grads[i] is not None:
                    in_use.add(_memory(grads[i]))
    return grads


def _memory(t: Tensor) -> int | None:
    return t.untyped_storage()._cdata if t.layout is torch.strided else None


def _key_of(leaf: Tensor | GradientEdge) -> object:
    """What `Segment.leaves` has for it."""
    if isinstance(leaf, Tensor):
        return id(leaf) if leaf.grad_fn is None else (leaf.grad_fn, leaf.output_nr)
    return leaf.node, leaf.output_nr


def _from_before(segments: Sequence[Segment], inputs: Sequence) -> Sequence[Tensor | None]:
    """What custom functions before the chain add to the gradients of ``inputs``.

    Autograd goes on to them with zeros, and such a function may send something all the same: an
    auxiliary loss, say. It does so again when these gradients have left the chain.
    """
    h = [segment.h_in for segment in segments if segment.h_in.requires_grad]
    zeros = [torch.zeros_like(t) for t in h]
    return torch.autograd.grad(h, inputs, zeros, retain_graph=True, allow_unused=True)


def _less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else -b if a is None else a - b


def with_fresh_graphs(segments: Sequence[Segment]) -> list[Segment]:
    """The segments; those whose graph the backward pass in progress frees are run once more."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return list(segments)
    extras: dict[int, Tensor] = {}
    return [segment.repeated(extras) if segment.is_used else segment for segment in segments]


def _pairs(
    segments: Sequence[Segment], b: Sequence[Cotangents], w_ends: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """`Segment.pairs` of all segments."""
    of_each = zip(segments, b, w_ends, strict=True)
    return [pair for s, b_s, w_end in of_each for pair in s.pairs(b_s, w_end)]


def gradients(
    pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence, retain: bool = True
) -> list[Tensor | None]:
    """Gradients of inputs, from (output, cotangent) pairs; None if no output depends on it."""
    known = [(out, c) for out, c in pairs if out.requires_grad]  # others are constant
    if not known or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*known, strict=True)
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain, allow_unused=True)
    return list(found)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, None for zero."""
    return a if b is None else b if a is None else a + b


def _check_maps(K: Carry, h_in: Tensor, h_out: Tensor, name: str) -> None:
    """A layer that changes the state's shape needs a carry that maps one shape to the other."""
    with torch.no_grad():
        shape = None if isinstance(K, Identity) else K.vecmat(torch.zeros_like(h_out)).shape
    if shape != h_in.shape:
        kind = "the identity" if shape is None else f"one that gives shape {tuple(shape)}"
        raise ValueError(
            f"{name} maps a state of shape {tuple(h_in.shape)} to {tuple(h_out.shape)} but its "
            f"carry is {kind}; give the layer a carry(h_in, h_out) whose vecmat(w) maps a "
            "cotangent of the second shape to the first"
        )


def _owned(v: Tensor, w: Tensor, may_be_kept: bool) -> Tensor:
    """v, or a copy of it: memory that may be written into.

    v may share memory with w or between its own elements. A custom function may keep it.
    """
    shares = _memory(v) == _memory(w)
    expanded = any(stride == 0 and n > 1 for stride, n in zip(v.stride(), v.shape, strict=True))
    return v.clone() if shares or expanded or may_be_kept else v
