"""The linear system of a chain of modules, as gradient methods see it (`methods.LinearSystem`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from highway_bp.carry import Carry
from highway_bp.scan import scan_
from highway_bp.segment import Segment

States = list[Tensor | None]  # w_0 .. w_L, None for zero or not wanted


class ModuleSystem:
    """Blocks, carries and cotangents between the states that the cuts leave visible.

    Args:
        segments: the L runs of layers.
        b: per segment the cotangents of all its states, None where no loss arrives.
    """

    def __init__(self, segments: Sequence[Segment], b: Sequence[Sequence[Tensor | None]]):
        self.length = len(segments)
        self._segments = segments
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

    def through_blocks(self, w: States, gamma: float, states: range) -> States:
        for i in states[self._first :] if states.start == 0 else states:
            w[i] = None  # ascending: w_{i+1} is still the old one, w_i is used up
            w[i] = self._pushed(i, w[i + 1], gamma)
        return w

    def scan(self, v: States, gamma: float, states: range) -> States:
        lo, hi = max(states.start, self._first), states.stop
        if gamma == 1.0 or lo >= hi:
            return v
        v[lo : hi + 1] = scan_(v[lo : hi + 1], [self._carry(i) for i in range(lo, hi)], 1 - gamma)
        return v

    def _pushed(self, i: int, w: Tensor | None, gamma: float) -> Tensor | None:
        """b_i + w (J + gamma K) for the segment between states i and i+1."""
        b = self._b[i]
        if w is None:
            return None if b is None else b.clone()
        segment = self._segments[i]
        v = segment.vjp(w)
        # The graph gives w J or w (J + K); what is missing or too much is a multiple of w K.
        share = gamma if segment.split else gamma - 1
        if share != 0:
            v = self._carry(i).accumulate_(v, w, share)
        if b is None:
            return v
        return b.clone() if v is None else v.add_(b)

    def _carry(self, i: int) -> Carry:
        carry = self._carries[i]
        if carry is None:
            carry = self._carries[i] = self._segments[i].carry()
        return carry
