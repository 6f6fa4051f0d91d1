"""`HasMethod`: what everything in a model that has a gradient method has in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.auto_gamma import GammaMemory
from highway_bp.layer_checks import refuse_affine, warn_without_residual
from highway_bp.methods import Highway, LinearSystem, Method, States, check_method
from highway_bp.mgrit import MGRIT

if TYPE_CHECKING:
    from highway_bp.layer_call import Layer, Returned
    from highway_bp.module_system import ModuleSystem


class HasMethod:
    """Has a gradient ``method``, which holds from the next forward pass on.

    Attributes:
        length: L, the layers or time steps of the chain.
        iterations: taken by each solution of the last backward pass.
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
        """Raise TypeError for what is no method, ValueError for one that this cannot take."""
        check_method(method)


class Chain(HasMethod):
    """A chain of modules, whoever calls them.

    Attributes:
        parameters: a method, those of all its layers.
        gammas: its layers' gammas, as far as they are estimated.
        checked: a first pass has gone through it.
        longest: layers of the longest chain of one forward pass: one layer may be called often.
    """

    parameters: Callable[[], Iterator[nn.Parameter]]

    def begin(self, method: Method) -> None:
        self.gammas, self.iterations, self.method = GammaMemory(), [], method
        self._warned: set[str] = set()
        self._looked_at: set[type] = set()
        self.checked, self.longest = False, 0

    def cuts(self, h: Tensor, args: tuple, kwargs: dict) -> bool:
        """Whether a forward pass is to be cut: a gradient is wanted, and not autograd's own."""
        if self.method.group_size is None or not torch.is_grad_enabled():
            return False
        given = [h, *pytree.tree_leaves((args, kwargs))]
        return any(isinstance(t, Tensor) and t.requires_grad for t in given) or any(
            p.requires_grad for p in self.parameters()
        )

    def follows(self, layer: Layer) -> bool:
        """Whether layers before it have been called in the same pass of the model."""
        return True

    def takes(self, layer: Layer, h: Tensor, returned: Returned) -> bool:
        """Whether what a layer has done with h makes it one of the chain."""
        return True

    def at_solve(self, system: ModuleSystem) -> None:
        """Before a system is solved: look once at what the method needs of its layers."""
        kind = type(self.method)
        if kind is Highway and kind not in self._looked_at:
            warn_without_residual(system)
        if kind is MGRIT and kind not in self._looked_at:
            refuse_affine(system)
        self._looked_at.add(kind)

    def warn_once(self, kind: str, line: str) -> None:
        """Warn, unless this chain has warned of that kind before."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(line, stacklevel=2)


class Watched:
    """The ``method`` of one forward pass of ``owner``, with its iterations counted.

    Every solution of its backward pass appends to ``owner.iterations`` how often it went through
    the blocks; the first one clears it.
    """

    def __init__(self, method: Method, owner: HasMethod):
        self.method, self._owner, self._begun = method, owner, False
        self.group_size = method.group_size

    def solve(self, system: LinearSystem) -> States:
        counted = _Counted(system)
        w = self.method.solve(counted)
        if not self._begun:
            self._owner.iterations, self._begun = [], True
        self._owner.iterations.append(counted.iterations)
        return w


class _Counted:
    """Counts what waits for each other where all layers of a call are at work at once."""

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
