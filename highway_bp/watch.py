"""How many iterations a method took: counted around it, so that methods and systems stay plain."""

from __future__ import annotations

from highway_bp.methods import LinearSystem, Method, States
from highway_bp.takes_method import TakesMethod


class Watched:
    """The ``method`` of one forward pass of ``taker``.

    Every solution of its backward pass appends to ``taker.iterations`` how often it went through
    the blocks; the first one clears it.
    """

    def __init__(self, method: Method, taker: TakesMethod):
        self._method, self._taker, self._begun = method, taker, False

    def groups(self, L: int) -> list[range] | None:
        return self._method.groups(L)

    def solve(self, system: LinearSystem) -> States:
        counted = _Counted(system)
        w = self._method.solve(counted)
        if not self._begun:
            self._taker.iterations, self._begun = [], True
        self._taker.iterations.append(counted.iterations)
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
