"""The linear system of a chain of modules, as gradient methods see it (`methods.LinearSystem`)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from highway_bp.auto_gamma import AutoGamma, smallest_block
from highway_bp.methods import Gamma
from highway_bp.scan import scan_
from highway_bp.segment import TOGETHER, Cotangents, Segment, add, vjps

States = list[Tensor | None]  # w_0 .. w_L, None for zero or not wanted


class Gammas(Protocol):
    def values_for(self, auto: AutoGamma, keys: Sequence[str], estimate: Callable) -> list[float]:
        """As `auto_gamma.GammaMemory`."""


class ModuleSystem:
    """Blocks, carries and cotangents between h_0 and the last states of the segments.

    Args:
        segments: the L segments.
        b: for each segment, the cotangents that losses send to its states and extras.
        gammas: estimates for gamma="auto".
    """

    def __init__(self, segments: Sequence[Segment], b: Sequence[Cotangents], gammas: Gammas):
        self.length, self.segments, self._gammas = len(segments), segments, gammas
        self._b: States = [None, *(b_segment.states[-1] for b_segment in b)]
        self._own: States = list(self._b)
        self.with_inner_losses: list[Segment] = []  # autograd goes through their graphs as well
        for i, (segment, b_segment) in enumerate(zip(segments, b, strict=True)):
            inner = segment.inner_cotangent(b_segment)
            self._b[i] = add(self._b[i], inner)
            self.with_inner_losses += [segment] if inner is not None or segment.is_repeated else []
        # States before the first trainable layer want no gradient.
        self._first_wanted = next((i for i, s in enumerate(segments) if s.wanted), self.length)

    def cotangents(self) -> States:
        # b_L is not cloned: no state comes after it, so no method changes it.
        return [*(None if b is None else b.clone() for b in self._b[:-1]), self._b[-1]]

    def own_cotangents(self) -> States:
        return list(self._own)

    def through_blocks(self, w: States, gamma: Gamma, states: range) -> States:
        rest = states[self._first_wanted :] if states.start == 0 else states
        for start in range(0, len(rest), TOGETHER):  # ascending: w_{i+1} is still the old one
            some = rest[start : start + TOGETHER]
            found = vjps([self.segments[i] for i in some], [w[i + 1] for i in some])
            for i, v in zip(some, found, strict=True):
                w[i] = self._b_plus_vjp(i, w[i + 1], v, gamma_of(gamma, i))
        return w

    def scan(self, v: States, gamma: Gamma, states: range) -> States:
        lo, hi = max(states.start, self._first_wanted), states.stop
        if gamma == 1.0 or lo >= hi:
            return v
        v[lo : hi + 1] = scan_(
            v[lo : hi + 1],
            [segment.K for segment in self.segments[lo:hi]],
            [1 - gamma_of(gamma, i) for i in range(lo, hi)],
        )
        return v

    def snapshot(self, w: States) -> States:
        return list(w)  # no call writes into a tensor of w: each state gets a new one

    def relative_change(self, w: States, old: States) -> float:
        return ratio(squares(w, old))

    def leap(self, w: States, n: int, states: range) -> States:
        """Steps of n layers (`mgrit.GridSystem`)."""
        return [self._coarse_step(i, w[i + n], n) for i in states]

    def smallest_blocks(self, auto: AutoGamma) -> list[float]:
        return self._gammas.values_for(auto, self.keys, self.estimate)

    @property
    def keys(self) -> list[str]:
        """One key for each segment, the same in every pass."""
        return [segment.key for segment in self.segments]

    def estimate(self, probes: int, seed: int) -> list[float]:
        """New values for `smallest_blocks`; they are not stored."""
        return [self._estimate_one(i, probes, seed) for i in range(self.length)]

    def _estimate_one(self, i: int, probes: int, seed: int) -> float:
        segment = self.segments[i]
        if i < self._first_wanted:
            return 0.0
        generator = probe_generator(segment.h_out, seed, i)
        zJ = partial(segment.through, block=1, carry=0)
        return smallest_block(zJ, segment.K.vecmat, segment.h_out, probes, generator)

    def _b_plus_vjp(
        self, i: int, w: Tensor | None, v: Tensor | None, gamma: float
    ) -> Tensor | None:
        """b_i + w (J + gamma K) for the segment between states i and i+1; v: its `vjp` of w."""
        b = self._b[i]
        if w is None:
            return None if b is None else b.clone()
        is_carried = v is None  # the result is then w K, which may share memory with w or the carry
        v = self.segments[i].weighted(w, v, 1, gamma)
        if b is None:
            return v
        if v is None:
            return b.clone()
        return v + b if is_carried else v.add_(b)

    def _coarse_step(self, i: int, w: Tensor | None, n: int) -> Tensor | None:
        """w A_i(n): from state i + n to state i in one step."""
        if w is None or i < self._first_wanted:
            return None
        for segment in reversed(self.segments[i + 1 : i + n]):
            w = segment.K.vecmat(w)
        return self.segments[i].through(w, n, 1)


def probe_generator(like: Tensor, seed: int, i: int) -> torch.Generator:
    """Random numbers for the layer between states i and i + 1, apart from the global stream."""
    return torch.Generator(like.device).manual_seed((seed << 16) + i)


def squares(w: States, old: States) -> Tensor:
    """||w - w_old||^2 and ||w||^2 over the states that are not None, (2,)."""
    pairs = [(v, u) for v, u in zip(w, old, strict=True) if v is not None]
    each = [torch.stack([_square(v if u is None else v - u), _square(v)]) for v, u in pairs]
    return torch.stack(each).sum(0) if each else torch.zeros(2)


def ratio(squares: Tensor) -> float:
    """||w - w_old|| / ||w||, from their squares."""
    changed, whole = squares.tolist()
    return math.sqrt(changed / whole) if whole else 0.0


def _square(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float32 if v.dtype.itemsize < 4 else None) ** 2


def gamma_of(gamma: Gamma, i: int) -> float:
    return gamma[i] if isinstance(gamma, list) else gamma
