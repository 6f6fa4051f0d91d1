"""The linear system of a chain of modules, as gradient methods see it (`methods.LinearSystem`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from highway_bp.auto_gamma import AutoGamma, GammaMemory, smallest_block
from highway_bp.carry import Carry
from highway_bp.methods import Gamma
from highway_bp.scan import scan_
from highway_bp.segment import Segment

States = list[Tensor | None]  # w_0 .. w_L, None for zero or not wanted


class ModuleSystem:
    """Blocks, carries and cotangents between the states that the cuts leave visible.

    Args:
        segments: the L runs of layers.
        b: per segment the cotangents of all its states, None where no loss arrives.
        gammas: the chain's estimates for gamma="auto".
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        b: Sequence[Sequence[Tensor | None]],
        gammas: GammaMemory,
    ):
        self.length = len(segments)
        self._gammas = gammas
        self.segments, self.b_segments = segments, b
        self._b: States = [None, *(b_seg[-1] for b_seg in b)]
        for i, (segment, b_seg) in enumerate(zip(segments, b, strict=True)):
            inner = segment.inner_cotangent(b_seg[:-1])
            if inner is not None:
                b_i = self._b[i]
                self._b[i] = inner if b_i is None else b_i + inner
        # States below the first trainable layer want no gradient.
        self._first = next((i for i, s in enumerate(segments) if s.h_in.requires_grad), self.length)

    def cotangents(self) -> States:
        # Not b_L: nothing comes after it, so no method changes it.
        return [*(None if b is None else b.clone() for b in self._b[:-1]), self._b[-1]]

    def through_blocks(self, w: States, gamma: Gamma, states: range) -> States:
        for i in states[self._first :] if states.start == 0 else states:
            w[i] = None  # ascending: w_{i+1} is still the old one, w_i is used up
            w[i] = self._pushed(i, w[i + 1], gamma_of(gamma, i))
        return w

    def scan(self, v: States, gamma: Gamma, states: range) -> States:
        lo, hi = max(states.start, self._first), states.stop
        if gamma == 1.0 or lo >= hi:
            return v
        v[lo : hi + 1] = scan_(
            v[lo : hi + 1],
            [segment.K for segment in self.segments[lo:hi]],
            [1 - gamma_of(gamma, i) for i in range(lo, hi)],
        )
        return v

    def ends(self, w: States) -> States:
        """w at the end of every segment, for the gradients of parameters."""
        return w[1:]

    def keep(self, w: States) -> States:
        return list(w)  # no call writes into a tensor of w: each state gets a new one

    def change(self, w: States, kept: States) -> float:
        return ratio(squares(w, kept))

    def leap(self, w: States, n: int, states: range) -> States:
        """Steps of n layers (`mgrit.GridSystem`)."""
        return [self._leapt(i, w[i + n], n) for i in states]

    def smallest_blocks(self, auto: AutoGamma) -> list[float]:
        return self._gammas.values_for(auto, self.length, self.estimate)

    @property
    def outputs(self) -> list[Tensor]:
        """h_1 .. h_L."""
        return [segment.h_out for segment in self.segments]

    def probe_gammas(self) -> list[float]:
        """An estimate of `smallest_blocks` by one probe."""
        return self.estimate(probes=1, seed=0)

    def estimate(self, probes: int, seed: int) -> list[float]:
        """New values for `smallest_blocks`, which nobody remembers."""
        return [self._estimate_one(i, probes, seed) for i in range(self.length)]

    def _estimate_one(self, i: int, probes: int, seed: int) -> float:
        segment = self.segments[i]
        if i < self._first:
            return 0.0
        generator = probe_generator(segment.h_out, seed, i)
        zJ = partial(segment.through, block=1, carry=0)
        return smallest_block(zJ, segment.K.vecmat, segment.h_out, probes, generator)

    def _pushed(self, i: int, w: Tensor | None, gamma: float) -> Tensor | None:
        """b_i + w (J + gamma K) for the segment between states i and i+1."""
        b = self._b[i]
        if w is None:
            return None if b is None else b.clone()
        v = self.segments[i].through(w, 1, gamma)
        if b is None:
            return v
        if v is None or v is w:  # w itself where J is zero and K the identity
            return b.clone() if v is None else v + b
        return v.add_(b)

    def _leapt(self, i: int, w: Tensor | None, n: int) -> Tensor | None:
        """w A_i(n): from state i + n to state i in one step."""
        if w is None or i < self._first:
            return None
        for segment in reversed(self.segments[i + 1 : i + n]):
            w = segment.K.vecmat(w)
        return self.segments[i].through(w, n, 1)

    def carry(self, i: int) -> Carry:
        """K_{i+1}, between states i and i + 1."""
        return self.segments[i].K


def probe_generator(like: Tensor, seed: int, i: int) -> torch.Generator:
    """Random numbers for the layer between states i and i + 1, apart from the global stream."""
    return torch.Generator(like.device).manual_seed((seed << 16) + i)


def squares(w: States, kept: States) -> Tensor:
    """Of the states that are known, ||w - w_kept||^2 and ||w||^2 (2,)."""
    pairs = [(v, u) for v, u in zip(w, kept, strict=True) if v is not None]
    each = [torch.stack([_square(v if u is None else v - u), _square(v)]) for v, u in pairs]
    return torch.stack(each).sum(0) if each else torch.zeros(2)


def ratio(squares: Tensor) -> float:
    """||w - w_kept|| / ||w||, of their squares."""
    changed, whole = squares.tolist()
    return math.sqrt(changed / whole) if whole else 0.0


def _square(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float32 if v.dtype.itemsize < 4 else None) ** 2


def gamma_of(gamma: Gamma, i: int) -> float:
    return gamma[i] if isinstance(gamma, list) else gamma
