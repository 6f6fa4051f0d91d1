"""How many iterations a method took: counted around it, so that methods and systems stay plain."""

from __future__ import annotations

from highway_bp.methods import LinearSystem, Method, States


class Watched:
    """``method``, each of whose solutions appends to ``iterations`` how often it went through
    the blocks."""

    def __init__(self, method: Method, iterations: list[int]):
        self._method, self._iterations = method, iterations

    def groups(self, L: int) -> list[range] | None:
        return self._method.groups(L)

    def solve(self, system: LinearSystem) -> States:
        counted = _Counted(system)
        w = self._method.solve(counted)
        self._iterations.append(counted.iterations)
        return w


class _Counted:
    def __init__(self, system: LinearSystem):
        self._system, self.iterations = system, 0

    def __getattr__(self, name: str):
        return getattr(self._system, name)

    def through_blocks(self, *args, **kwargs) -> States:
        self.iterations += 1
        return self._system.through_blocks(*args, **kwargs)
