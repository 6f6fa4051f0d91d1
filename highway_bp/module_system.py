"""The linear system of a chain of modules, as gradient methods see it (`methods.LinearSystem`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        start: number of the first segment, where others come before it on other processes.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        b: Sequence[Sequence[Tensor | None]],
        gammas: GammaMemory,
        start: int = 0,
    ):
        self._start = start
        self.length = len(segments)
        self._gammas = gammas
        self.segments = segments
        self._b: States = [None, *(b_seg[-1] for b_seg in b)]
        for i, (segment, b_seg) in enumerate(zip(segments, b, strict=True)):
            inner = segment.inner_cotangent(b_seg[:-1])
            if inner is not None:
                b_i = self._b[i]
                self._b[i] = inner if b_i is None else b_i + inner
        # States below the first trainable layer want no gradient.
        self._first = next((i for i, s in enumerate(segments) if s.h_in.requires_grad), self.length)
        self._carries: list[Carry | None] = [None] * self.length  # formed once, where asked

    def cotangents(self) -> States:
        # Not b_L: nothing comes after it, so no method changes it.
        return [*(None if b is None else b.clone() for b in self._b[:-1]), self._b[-1]]

    def through_blocks(self, w: States, gamma: Gamma, states: range) -> States:
        for i in states[self._first :] if states.start == 0 else states:
            w[i] = None  # ascending: w_{i+1} is still the old one, w_i is used up
            w[i] = self._pushed(i, w[i + 1], _of(gamma, i))
        return w

    def scan(self, v: States, gamma: Gamma, states: range) -> States:
        lo, hi = max(states.start, self._first), states.stop
        if gamma == 1.0 or lo >= hi:
            return v
        v[lo : hi + 1] = scan_(
            v[lo : hi + 1],
            [self.carry(i) for i in range(lo, hi)],
            [1 - _of(gamma, i) for i in range(lo, hi)],
        )
        return v

    def keep(self, w: States) -> States:
        return list(w)  # no call writes into a tensor of w: each state gets a new one

    def change(self, w: States, kept: States) -> float:
        squares = [
            torch.stack([_square(v if u is None else v - u), _square(v)])
            for v, u in zip(w, kept, strict=True)
            if v is not None
        ]
        changed, whole = torch.stack(squares).sum(0).tolist() if squares else (0.0, 0.0)
        return math.sqrt(changed / whole) if whole else 0.0

    # Steps of n layers, for `mgrit.MGRIT`. States share tensors, so none is written into.

    def copy(self, w: States) -> States:
        return list(w)

    def relax(self, w: States, b: States, n: int, states: range) -> States:
        for i in self._wanted(states):
            w[i] = _sum(self._leapt(i, w[i + n], n), b[i])
        return w

    def residual(self, w: States, b: States, n: int, states: range) -> States:
        r: States = [None] * len(w)
        for i in self._wanted(states):
            r[i] = _sum(self._leapt(i, w[i + n], n), b[i], None if w[i] is None else -w[i])
        return r

    def add(self, w: States, e: States) -> States:
        return [_sum(w_i, e_i) for w_i, e_i in zip(w, e, strict=True)]

    def _wanted(self, states: range) -> list[int]:
        return [i for i in states if i >= self._first]

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
        segment, K = self.segments[i], self.carry(i) if i >= self._first else None
        if K is None:
            return 0.0
        generator = torch.Generator(segment.h_in.device)  # leaves the global stream alone
        generator.manual_seed((seed << 16) + self._start + i)

        def zJ(z: Tensor) -> Tensor | None:
            v = segment.vjp(z)
            return v if segment.split else K.accumulate_(v, z, -1.0)

        return smallest_block(zJ, K.vecmat, segment.h_out, probes, generator)

    def _pushed(self, i: int, w: Tensor | None, gamma: float) -> Tensor | None:
        """b_i + w (J + gamma K) for the segment between states i and i+1."""
        b = self._b[i]
        if w is None:
            return None if b is None else b.clone()
        v = self.through(i, w, 1, gamma)
        if b is None:
            return v
        if v is None or v is w:  # w itself where J is zero and K the identity
            return b.clone() if v is None else v + b
        return v.add_(b)

    def through(self, i: int, w: Tensor, block: float, carry: float) -> Tensor | None:
        """w (block J + carry K) for the segment between states i and i+1."""
        segment = self.segments[i]
        v = segment.vjp(w)
        if v is not None and block != 1:
            v = v.mul_(block)
        # The graph gives w J or w (J + K); what is missing or too much is a multiple of w K.
        share = carry if segment.split else carry - block
        return self.carry(i).accumulate_(v, w, share) if share != 0 else v

    def _leapt(self, i: int, w: Tensor | None, n: int) -> Tensor | None:
        """w A_i(n): from state i + n to state i in one step (`mgrit.GridSystem`)."""
        if w is None:
            return None
        for j in reversed(range(i + 1, i + n)):
            w = self.carry(j).vecmat(w)
        return self.through(i, w, n, 1)

    def carry(self, i: int) -> Carry:
        """K_{i+1}, between states i and i + 1."""
        carry = self._carries[i]
        if carry is None:
            carry = self._carries[i] = self.segments[i].carry()
        return carry


def _square(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float32 if v.dtype.itemsize < 4 else None) ** 2


def _sum(*terms: Tensor | None) -> Tensor | None:
    known = [t for t in terms if t is not None]
    return sum(known[1:], known[0]) if known else None


def _of(gamma: Gamma, i: int) -> float:
    return gamma[i] if isinstance(gamma, list) else gamma
