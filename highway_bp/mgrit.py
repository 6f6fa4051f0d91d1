"""MGRIT: multigrid reduction over the layers, for the backward pass (Falgout et al. 2014;
Günther et al. 2020 for residual networks; Moon & Cyr 2022 for recurrent ones).

The system w_{i-1} = b_{i-1} + w_i (J_i + K_i) is a time stepping from state L down to 0. Every
m-th state, counted from the last, is a C-point; the others are F-points:

    L = 10, m = 4       C  F  F  F  C  F  F  F  C  F  F
                       10  9  8  7  6  5  4  3  2  1  0

All intervals between C-points are solved at once. From C-point to C-point, the error travels in
coarse steps of m layers each. These form a coarser grid, which is solved in the same way; the last
grid is solved step by step. The system is linear, so a coarse grid solves for the error alone.
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
    """A system that can also take steps of n layers.

    Such a step is like one step h + n dt g(h) of an ODE instead of n steps h + dt g(h). It uses all
    n carries but only one block, n times as large. This is the block of the layer that reads state
    i, where the step ends:

        A_i(n) = K_{i+n} ... K_{i+2} (K_{i+1} + n J_{i+1}),        A_i(1) = K_{i+1} + J_{i+1}
    """

    def leap(self, w: States, n: int, states: range) -> States:
        """Return w_{i+n} A_i(n) for the i in ``states`` only, all at once."""


@dataclass(frozen=True)
class MGRIT:
    """Multigrid over the layers: exact inside intervals, corrected from coarser grids.

    With N = L // coarsening intervals, the gradient is exact after N - 1 cycles ("FCF": half of
    them); further cycles are skipped. `iterations` counts the passes that must run one after the
    other even if every layer has its own device. With two levels and m = coarsening these are
    2m + N - 2 for the first guess, then m + N - 1 per cycle (m more with "FCF").

    Args:
        cycles: V-cycles after the first guess, cycles >= 0. The guess is one V-cycle on w = b with
            F-relaxation: every loss travels exactly up to the next C-point, and in coarse steps
            from there on.
        coarsening: layers per interval, and steps of one grid per step of the next, >= 2.
        levels: number of grids; 1 is substitution (exact and sequential), 2 is parareal.
        relaxation: "F" solves inside the intervals before a coarse grid is used, "FCF" through two
            intervals.

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
        """Cycles to run. The guess is exact on one interval, each cycle on one or two more."""
        if grid.is_last:
            return 0
        new = 2 if self.relaxation == "FCF" else 1
        return min(self.cycles, -(-(len(grid.coarse) - 1) // new))


@dataclass(frozen=True)
class Grid:
    """The states L, L - n, L - 2n, ...; every ``m``-th of them is a C-point. ``levels`` counts this
    grid and all coarser ones."""

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
        """The C-points except L, where w is known."""
        return self._behind_coarse(self.m)

    @property
    def fine(self) -> list[range]:
        """The F-points one step below each C-point, then those two steps below, ..."""
        return [states for s in range(1, self.m) if (states := self._behind_coarse(s))]

    @property
    def one_by_one(self) -> list[range]:
        """All points but L, in the order of substitution. On a coarse grid the solution is the
        error, which is zero at L, so the first step from L is left out."""
        first = self.n if self.n == 1 else 2 * self.n
        return [range(i, i + 1) for i in range(self.L - first, -1, -self.n)]

    def _behind_coarse(self, steps: int) -> range:
        last, interval = self.L - steps * self.n, self.n * self.m
        return range(last % interval, last + 1, interval)


def _solved(system: GridSystem, grid: Grid, b: States, relaxation: str) -> States:
    """w for the cotangents b: exact on the last grid, one V-cycle on w = b on the others."""
    w = list(b) if isinstance(b, list) else b.clone()
    if not grid.is_last:
        return _improved(system, grid, _relaxed(system, grid, grid.fine, w, b), b, relaxation)
    return _relaxed(system, grid, grid.one_by_one, w, b)


def _improved(system: GridSystem, grid: Grid, w: States, b: States, relaxation: str) -> States:
    """One V-cycle on w; the F-points of w must already be solved from its C-points."""
    if relaxation == "FCF":
        w = _relaxed(system, grid, [grid.coarse, *grid.fine], w, b)
    at = slice_of(grid.coarse)
    r = [None] * len(w) if isinstance(w, list) else torch.zeros_like(w)
    r[at] = _plus(_plus(b[at], system.leap(w, grid.n, grid.coarse)), w[at], -1)  # the residual
    e = _solved(system, grid.coarser, r, relaxation)
    return _relaxed(system, grid, grid.fine, _plus(w, e), b)


def _relaxed(system: GridSystem, grid: Grid, each: Sequence[range], w: States, b: States) -> States:
    """Write w_i = b_i + w_{i+n} A_i(n) into w: range by range, all states of a range at once."""
    for states in each:
        w[slice_of(states)] = _plus(b[slice_of(states)], system.leap(w, grid.n, states))
    return w


def slice_of(states: range, ahead: int = 0) -> slice:
    """The slice of w_0 .. w_L that holds the states i + ``ahead`` for i in ``states``."""
    return slice(states[0] + ahead, states[-1] + ahead + 1, states.step)


def _plus(v: States, w: States, sign: int = 1) -> States:
    """v + sign w, for states stacked in a tensor or in a list, where None stands for zero."""
    if isinstance(v, list):
        return [_plus(v_i, w_i, sign) for v_i, w_i in zip(v, w, strict=True)]
    if v is None or w is None:
        return v if w is None else sign * w
    return torch.add(v, w, alpha=sign)
