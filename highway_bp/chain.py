"""`ResidualChain`: residual layers whose backward pass is solved by a gradient method."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.auto_gamma import GammaMemory
from highway_bp.first_order import first_order
from highway_bp.leaves import check_leaves
from highway_bp.methods import Backprop, Highway, Method
from highway_bp.module_system import ModuleSystem
from highway_bp.residual_check import warn_without_residual
from highway_bp.segment import Segment, run_segment
from highway_bp.split_check import check_split
from highway_bp.takes_method import TakesMethod
from highway_bp.watch import Watched


class ResidualChain(TakesMethod, nn.ModuleList):
    """h_i = f_i(h_{i-1}), i = 1..L, with h_0 the input; gradients by ``method`` (paper, Eq. 2-3).

    The forward pass is exact whatever the method. The ``state_dict`` is that of an
    ``nn.Sequential`` of the same layers.

    A layer is any ``nn.Module`` that maps one tensor to one tensor. It may say more of itself:

    - ``carry(h_in, h_out)``: its residual path's Jacobian K, as None (identity, the default), a
      number, a tensor (the diagonal) or an object with ``vecmat(w)`` (see ``highway_bp.carry``);
    - ``with_carry(h, *args)``: forward(h) and such a K, where K needs what forward computed;
    - ``block(h, *args)`` and ``residual(h, z)`` with forward(h) = residual(h, block(h)): then the
      block's own vector-Jacobian product is used, and w K need not be subtracted.

    Args:
        layers: the layers f_1 .. f_L.
        method: ``Backprop()`` (the default, exact), ``FixedPoint(k)`` or ``Highway(k)``; the
            attribute ``method`` may be set at any time and holds from the next forward pass on.

    Raises:
        TypeError: ``method`` is not a gradient method.
    """

    def __init__(self, layers: Iterable[nn.Module], method: Method | None = None):
        super().__init__(layers)
        self._checked = False  # by the first pass: captured tensors, carries, missing residuals
        self.gammas = GammaMemory()
        self.iterations: list[int] = []  # of the last backward pass
        self.method = Backprop() if method is None else method

    @property
    def length(self) -> int:
        return len(self)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ResidualChain(list(self)[index], self.method)
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        return f"method={self.method}"

    def forward(
        self, h: Tensor, *args, return_states: bool = False, **kwargs
    ) -> Tensor | list[Tensor]:
        """Run all layers.

        Args:
            h: the input state h_0, floating, any shape.
            *args, **kwargs: passed on to every layer; gradients flow to tensors among them.
            return_states: return [h_1, ..., h_L], each of which may enter the loss.

        Returns:
            h_L, or all states.

        Raises:
            TypeError: ``h`` is not a floating tensor, or a layer returns something else.
            ValueError: the carry of a layer with ``block`` and ``residual`` is not its residual
                path's (looked at on the first pass).
            RuntimeError: a layer uses a tensor that needs a gradient and is neither a parameter
                of the chain nor an argument.
        """
        if not isinstance(h, Tensor) or not (h.is_floating_point() or h.is_complex()):
            what = str(h.dtype) if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"input state is {what}; expected a floating tensor")
        groups = self.method.groups(len(self))
        # Only plain containers are opened: a key-value cache is one object, written into.
        flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_no_container)
        tensors = {id(t): t for t in flat if isinstance(t, Tensor)}  # each once
        wanted = [t for t in tensors.values() if t.requires_grad]
        params = [p for p in self.parameters() if p.requires_grad]
        trains = h.requires_grad or bool(wanted) or bool(params)
        if groups is None or not torch.is_grad_enabled() or not trains:
            states = self._plain(h, args, kwargs)
        else:
            states = self._cut(groups, flat, spec, h, wanted, params)
        if return_states:
            return states
        return states[-1] if states else h

    def _plain(self, h: Tensor, args: tuple, kwargs: dict) -> list[Tensor]:
        states = []
        for layer in self:
            h = layer(h, *args, **kwargs)
            states.append(h)
        return states

    @torch.compiler.disable(recursive=False)
    def _cut(self, groups, flat, spec, h, wanted, params) -> list[Tensor]:
        # torch.compile'd layers may not give their buffers away: the graph is walked k + 1 times.
        with _keep_buffers():
            return list(
                _CutChain.apply(self, groups, (flat, spec), len(wanted), h, *wanted, *params)
            )

    def _run(self, groups: list[range], h: Tensor, args: tuple, kwargs: dict) -> list[Segment]:
        segments = []
        for group in groups:
            layers = [self[i] for i in group]
            names = [f"layer {i} ({self[i]._get_name()})" for i in group]
            segment = run_segment(layers, names, h, args, kwargs)
            if not self._checked:
                check_split(segment)
            segment.z = None  # a hidden state of memory
            segments.append(segment)
            h = segment.h_out
        return segments


class _CutChain(torch.autograd.Function):
    """Forward: every segment on a graph of its own. Backward: the method's solution, then one
    pass for all parameter gradients w_i df_i/dtheta_i."""

    @staticmethod
    def forward(ctx, chain, groups, arguments, n_wanted, h, *leaves):
        flat, spec = arguments
        wanted, params = leaves[:n_wanted], leaves[n_wanted:]
        copies = {id(t): t.detach().requires_grad_() for t in wanted}
        args, kwargs = pytree.tree_unflatten([copies.get(id(t), t) for t in flat], spec)
        with torch.enable_grad():
            segments = chain._run(groups, h, args, kwargs)
        ctx.segments, ctx.gammas = segments, chain.gammas
        ctx.method = Watched(chain.method, chain)
        ctx.leaves = [*(copies[id(t)] for t in wanted), *params]
        ctx.set_materialize_grads(False)
        ctx.check_residual = not chain._checked and isinstance(chain.method, Highway)
        if not chain._checked:
            check_leaves(segments, ctx.leaves)
            chain._checked = True
        return tuple(state.detach() for segment in segments for state in segment.states)

    @first_order
    def backward(ctx, *grads):
        if ctx.segments is None:
            raise RuntimeError(
                "Trying to backward through a ResidualChain a second time: the graphs of its "
                "layers are freed. Call the first backward() with retain_graph=True"
            )
        segments, rest, b = ctx.segments, list(grads), []
        for segment in segments:
            b.append(rest[: len(segment.states)])
            del rest[: len(segment.states)]
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        system = ModuleSystem(segments, b, ctx.gammas)
        if ctx.check_residual:
            warn_without_residual(system)
        w = ctx.method.solve(system)
        leaf_grads = parameter_step(segments, b, w, ctx.leaves, keep)
        if not keep:
            ctx.segments = None
        w_0 = w[0]
        if w_0 is None and ctx.needs_input_grad[4]:
            w_0 = torch.zeros_like(segments[0].h_in)
        return None, None, None, None, w_0, *leaf_grads


def parameter_step(segments, b, w, leaves, keep: bool) -> list[Tensor | None]:
    """w_i df_i/dtheta_i of all layers in one pass of the autograd engine."""
    outputs, cotangents = [], []
    for segment, b_segment, w_end in zip(segments, b, w[1:], strict=True):
        for state, c in zip(segment.states, [*b_segment[:-1], w_end], strict=True):
            if c is not None and state.requires_grad:
                outputs.append(state)
                cotangents.append(c)
    grads: list[Tensor | None] = [None] * len(leaves)
    if outputs and leaves:
        grads = list(
            torch.autograd.grad(outputs, leaves, cotangents, retain_graph=keep, allow_unused=True)
        )
    if any(w_end is None for w_end in w[1:]):  # layers no path has reached: zero, not "unused"
        grads = [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
        ]
    return grads


def is_no_container(value: object) -> bool:
    return type(value) not in (tuple, list, dict)


def _keep_buffers():
    """Tell the compiler, where it is in use, that backward graphs are walked more than once."""
    config = sys.modules.get("torch._functorch.config")
    return contextlib.nullcontext() if config is None else config.patch(donated_buffer=False)
