"""`HasMethod`: base class of all parts of a model that have a gradient method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from highway_bp.auto_gamma import GammaMemory
from highway_bp.containers import wants_gradient
from highway_bp.layer_checks import refuse_nonlinear, refuse_unrepeatable, warn_without_residual
from highway_bp.methods import Highway, LinearSystem, Method, States, check_method
from highway_bp.mgrit import MGRIT
from highway_bp.surroundings import parameters_of

if TYPE_CHECKING:
    from highway_bp.layer_call import Layer, Returned
    from highway_bp.module_system import ModuleSystem
    from highway_bp.parallel.sharded_system import ShardedSystem
    from highway_bp.segment import Segment


HOOKS = "torch.utils.hooks.BackwardHookFunction"  # of modules with backward hooks: harmless


class HasMethod:
    """Has a gradient ``method``; a new one is used from the next forward pass on.

    Attributes:
        length: L, the number of layers or time steps of the chain.
        iterations: the number of iterations of each solve in the last backward pass.
    """

    length: int
    iterations: list[int]

    @property
    def method(self) -> Method:
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self.check_method(method)
        self._method = method

    def check_method(self, method: Method) -> None:
        """Raise TypeError if ``method`` is no method, ValueError if it cannot be used here."""
        check_method(method)


class Chain(HasMethod):
    """A chain of modules, called by the chain itself or by the model's own code.

    Attributes:
        parameters: a function that returns the parameters of all layers.
        gammas: the estimates of gamma for its layers.
        longest: most layer calls in one chain so far; a pass may call one layer several times.
    """

    parameters: Callable[[], Iterator[nn.Parameter]]

    def set_up(self, method: Method) -> None:
        self.gammas, self.iterations, self.method = GammaMemory(), [], method
        self._warned: set[str] = set()
        self._checked: set[type | str] = set()  # methods and kinds of checks
        self.longest = self._turn = 0

    def cuts(self, h: Tensor, args: tuple, kwargs: dict) -> bool:
        """Whether a forward pass is to be cut: a gradient is wanted, and not from `Backprop`."""
        if self.method.group_size is None or not torch.is_grad_enabled():
            return False
        return wants_gradient((h, args, kwargs), self.parameters())

    def has_earlier_layers(self, layer: Layer) -> bool:
        """Whether layers before ``layer`` have been called in the same pass of the model."""
        return True

    def leaves_out(self, layer: Layer) -> bool:
        """Whether the first call of ``layer`` has shown no residual path: it runs as before."""
        return False

    def accepts(self, layer: Layer, h: Tensor, returned: Returned) -> bool:
        """Whether a layer belongs to the chain, judged by what it has returned for h.

        Without any state, it does: `Segment.add` reports the error.
        """
        return returned.state is None or returned.state.requires_grad

    def at_solve(self, system: ModuleSystem) -> None:
        """Check once, before a system is solved, what the method requires of the layers."""
        kind = type(self.method)
        self.refuse_not_additive(system)
        if kind is Highway and kind not in self._checked:
            warn_without_residual(system)
        self._checked.add(kind)

    def refuse_not_additive(self, system: ModuleSystem | ShardedSystem) -> None:
        """Refuse layers where several products do not add up to autograd's one. The first time all
        such layers are checked, later those with custom functions."""
        if type(self.method) is MGRIT:
            self._refuse_nonlinear(system.segments, "MGRIT")
        what = "losses on states inside a group, on extra outputs or inside layers"
        self._refuse_nonlinear(system.with_inner_losses, what)

    def _refuse_nonlinear(self, segments: Sequence[Segment], what: str) -> None:
        first = what not in self._checked
        refuse_nonlinear([s for s in segments if first or s.functions], what)
        if segments:
            self._checked.add(what)

    def refuse_unrepeatable(self, segments: Sequence[Segment]) -> None:
        """Run the backward pass of layers twice, before their first product, and compare. The first
        solve checks all layers; a later one checks, for each set of custom functions, one layer
        that has them, each in its turn."""
        first = "functions" not in self._checked
        suspects = [s for s in segments if s.wanted and (first or s.functions - {HOOKS})]
        if suspects:
            self._turn = (self._turn + 1) % len(suspects)
            turned = suspects[self._turn :] + suspects[: self._turn]
            for segment in turned if first else {s.functions: s for s in turned}.values():
                layers = [call.layer for call in segment.calls]
                modules = [layer.module for layer in layers]
                weights = [p for m in modules for p in parameters_of(m)]
                inputs = [segment.h_in, *(p for p in weights if p.requires_grad and p.is_leaf)]
                buffers = [b for m in modules for b in m.buffers()] if segment.functions else None
                refuse_unrepeatable(layers[0].name, segment.h_out, inputs, buffers)
            self._checked.add("functions")

    def warn_once(self, kind: str, line: str) -> None:
        """Warn, unless this chain has warned of that kind before."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(line, stacklevel=2)


class CountedMethod:
    """The ``method`` of one forward pass of ``owner``; counts its iterations.

    Each solve of the backward pass appends its number of iterations to ``owner.iterations``. The
    first solve clears that list before.
    """

    def __init__(self, method: Method, owner: HasMethod):
        self.method, self._owner, self._begun = method, owner, False
        self.group_size = method.group_size

    def solve(self, system: LinearSystem) -> States:
        counted = _CountedSystem(system)
        w = self.method.solve(counted)
        if not self._begun:
            self._owner.iterations, self._begun = [], True
        self._owner.iterations.append(counted.iterations)
        return w


class _CountedSystem:
    """Counts the calls that must wait for each other, if all layers of one call run in parallel."""

    def __init__(self, system: LinearSystem):
        self._system, self.iterations = system, 0

    def __getattr__(self, name: str):
        return getattr(self._system, name)

    def through_blocks(self, *args, **kwargs) -> States:
        self.iterations += 1
        return self._system.through_blocks(*args, **kwargs)

    def leap(self, *args) -> States:
        self.iterations += 1
        return self._system.leap(*args)
