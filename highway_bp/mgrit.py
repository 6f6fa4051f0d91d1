"""MGRIT: multigrid reduction over the layers, for the backward pass (Falgout et al. 2014;
Günther et al. 2020 for residual networks; Moon & Cyr 2022 for recurrent ones).

The system w_{i-1} = b_{i-1} + w_i (J_i + K_i) is a time stepping from state L down to 0. Of every
m states one is a C-point, counted from the last, the others are F-points:

    L = 10, m = 4       C  F  F  F  C  F  F  F  C  F  F
                       10  9  8  7  6  5  4  3  2  1  0

Between C-points all intervals are solved at once; from one to the next the error travels in coarse
steps, m layers each, which are solved in the same way or, on the last grid, one after another. The
system is linear, so the coarse grid solves for the error and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from highway_bp.check import check_whole
from highway_bp.methods import LinearSystem, States

RELAXATIONS = ("F", "FCF")


class GridSystem(LinearSystem, Protocol):
    """A system whose layers can also be stepped over n at a time.

    A step of n layers is that of an ODE, one h + n dt g(h) instead of n times h + dt g(h): of the
    n blocks it takes that of the layer which reads the state it ends at, n times as large, and it
    keeps the carries of all:

        A_i(n) = K_{i+n} ... K_{i+2} (K_{i+1} + n J_{i+1}),        A_i(1) = K_{i+1} + J_{i+1}
    """

    def leap(self, w: States, n: int, states: range) -> States:
        """w_{i+n} A_i(n) for i in ``states``, all at once, and no others."""


@dataclass(frozen=True)
class MGRIT:
    """Multigrid over the layers: exact inside intervals, corrected from coarser grids.

    With N = L // coarsening intervals, the gradient is exact after N - 1 cycles ("FCF": half of
    them); further cycles are skipped. `iterations` counts passes that wait for each other when
    every layer has a device of its own. With two levels and m = coarsening these are 2m + N - 2 for
    the first guess, then m + N - 1 per cycle (m more with "FCF").

    Args:
        cycles: V-cycles after the first guess, cycles >= 0. The guess is one V-cycle on w = b with
            F-relaxation: every loss travels exactly as far as the next C-point, from there on in
            coarse steps.
        coarsening: layers in an interval, and coarse steps in one of the next grid, >= 2.
        levels: grids; 1 is substitution, exact and sequential, 2 is parareal.
        relaxation: what is solved before a coarse grid is used: "F" inside the intervals, "FCF"
            through two intervals.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    cycles: int = 1
    coarsening: int = 4
    levels: int = 2
    relaxation: str = "FCF"

    def __post_init__(self) -> None:
        check_whole("cycles", self.cycles, least=0)
        check_whole("coarsening", self.coarsening, least=2)
        check_whole("levels", self.levels, least=1)
        if self.relaxation not in RELAXATIONS:
            raise ValueError(f"relaxation={self.relaxation!r}; expected one of F, FCF")

    group_size: ClassVar[int] = 1

    def solve(self, system: GridSystem) -> States:
        grid = Grid(system.length, 1, self.coarsening, self.levels)
        b = system.cotangents()
        w = _solved(system, grid, b, "F")
        for _ in range(self._needed(grid)):
            w = _improved(system, grid, w, b, self.relaxation)
        return w

    def _needed(self, grid: Grid) -> int:
        """Cycles until w is exact: the guess is on one interval, each cycle on one or two more."""
        if grid.is_last:
            return 0
        new = 2 if self.relaxation == "FCF" else 1
        return min(self.cycles, -(-(len(grid.coarse) - 1) // new))


@dataclass(frozen=True)
class Grid:
    """The states L, L - n, L - 2n, ..., each ``m``-th of them a C-point; ``levels`` with it."""

    L: int
    n: int
    m: int
    levels: int

    @property
    def is_last(self) -> bool:
        return self.levels == 1 or len(self.coarse) == 0

    @property
    def coarser(self) -> Grid:
        return Grid(self.L, self.n * self.m, self.m, self.levels - 1)

    @property
    def coarse(self) -> range:
        """The C-points but for L, where w is known."""
        return self._behind_coarse(self.m)

    @property
    def fine(self) -> list[range]:
        """The F-points one step behind each C-point, those two steps behind, ..."""
        return [states for s in range(1, self.m) if (states := self._behind_coarse(s))]

    @property
    def one_by_one(self) -> list[range]:
        """All points in the order of substitution. A coarse grid's solution, the error, is zero at
        L: its first step would find nothing to take along."""
        first = self.n if self.n == 1 else 2 * self.n
        return [range(i, i + 1) for i in range(self.L - first, -1, -self.n)]

    def _behind_coarse(self, steps: int) -> range:
        last, interval = self.L - steps * self.n, self.n * self.m
        return range(last % interval, last + 1, interval)


def _solved(system: GridSystem, grid: Grid, b: States, relaxation: str) -> States:
    """w for the cotangents b: exact on the last grid, above it one V-cycle on w = b."""
    w = list(b) if isinstance(b, list) else b.clone()
    if not grid.is_last:
        return _improved(system, grid, _relaxed(system, grid, grid.fine, w, b), b, relaxation)
    return _relaxed(system, grid, grid.one_by_one, w, b)


def _improved(system: GridSystem, grid: Grid, w: States, b: States, relaxation: str) -> States:
    """One V-cycle on w, whose F-points follow from its C-points already."""
    if relaxation == "FCF":
        w = _relaxed(system, grid, [grid.coarse, *grid.fine], w, b)
    at = rows(grid.coarse)
    r = [None] * len(w) if isinstance(w, list) else torch.zeros_like(w)
    r[at] = _plus(_plus(b[at], system.leap(w, grid.n, grid.coarse)), w[at], -1)  # the residual
    e = _solved(system, grid.coarser, r, relaxation)
    return _relaxed(system, grid, grid.fine, _plus(w, e), b)


def _relaxed(system: GridSystem, grid: Grid, each: Sequence[range], w: States, b: States) -> States:
    """w_i = b_i + w_{i+n} A_i(n), written into w, for the states of each range at once."""
    for states in each:
        w[rows(states)] = _plus(b[rows(states)], system.leap(w, grid.n, states))
    return w


def rows(states: range, ahead: int = 0) -> slice:
    """Where ``states``, or those so many ahead of them, lie in w_0 .. w_L."""
    return slice(states[0] + ahead, states[-1] + ahead + 1, states.step)


def _plus(v: States, w: States, sign: int = 1) -> States:
    """v + sign w of states stacked in a tensor, or listed one by one with None for zero."""
    if isinstance(v, list):
        return [_plus(v_i, w_i, sign) for v_i, w_i in zip(v, w, strict=True)]
    if v is None or w is None:
        return v if w is None else sign * w
    return torch.add(v, w, alpha=sign)
