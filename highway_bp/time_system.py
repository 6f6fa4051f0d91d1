"""The linear system of one recurrent cell over time, all steps at once (`methods.LinearSystem`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class DiagonalScan:
    """u_i = v_i + u_{i+1} K_i in place on stacked states, with about 2 sqrt(L) dependent steps.

    The twin of `scan.cumsumprod` that keeps the products of K for the next call.

    Args:
        K: diagonals (L, B, H); K[i] carries state i+1 to i.
        scale: factor on every K.
    """

    def __init__(self, K: Tensor, scale: float = 1.0):
        L = len(K)
        self.size = math.isqrt(L) + 1
        self.blocks = -(-(L + 1) // self.size)
        K = K * scale if scale != 1.0 else K
        padding = K.new_zeros(self.blocks * self.size - L, *K.shape[1:])
        self._K = torch.cat([K, padding]).unflatten(0, (self.blocks, self.size))
        self._P = self._K.clone()  # from the first state of the next block to here
        for j in reversed(range(self.size - 1)):
            self._P[:, j] *= self._P[:, j + 1]

    def padded(self, b: Tensor) -> Tensor:
        """Zero for h_0, then b (L, B, H), then zeros to the length of the blocks together."""
        v = b.new_empty(self.blocks * self.size, *b.shape[1:])
        v[0].zero_()
        v[1 : len(b) + 1] = b
        v[len(b) + 1 :].zero_()
        return v

    def __call__(self, v: Tensor) -> Tensor:
        """Scan ``v``, which `padded` made, in place; returns it."""
        u = v.unflatten(0, (self.blocks, self.size))
        for j in reversed(range(self.size - 1)):
            u[:, j].addcmul_(u[:, j + 1], self._K[:, j])
        for m in reversed(range(self.blocks - 1)):
            u[m, 0].addcmul_(u[m + 1, 0], self._P[m, 0])
        u[:-1, 1:].addcmul_(u[1:, :1], self._P[:-1, 1:])
        return v


class TimeSystem:
    """States h_0 .. h_L of a cell with diagonal carry; methods see one padded tensor.

    Every call works on all states, whatever ``states`` says: those that are exact already come
    out the same, and no slices have to be copied.

    Args:
        b: cotangents from the losses on h_1 .. h_L (L, B, H); on h_0 there is none.
        K: the carry's diagonals (L, B, H).
        vjp: w (L, B, H), the cotangents of h_1 .. h_L, to w J (L, B, H), those of h_0 .. h_{L-1}.
    """

    def __init__(self, b: Tensor, K: Tensor, vjp: Callable[[Tensor], Tensor]):
        self.length = len(K)
        self._b, self._K, self._vjp = b, K, vjp
        self._scans: dict[float, DiagonalScan] = {}

    def cotangents(self) -> Tensor:
        return self._scan(0.0).padded(self._b)

    def through_blocks(self, w: Tensor, gamma: float, states: range) -> Tensor:
        L = self.length
        v = self._vjp(w[1 : L + 1])
        if gamma != 0.0:
            v = v.addcmul(w[1 : L + 1], self._K, value=gamma)
        w[0] = v[0]
        torch.add(self._b[:-1], v[1:], out=w[1:L])
        w[L] = self._b[-1]
        return w

    def scan(self, v: Tensor, gamma: float, states: range) -> Tensor:
        return v if gamma == 1.0 else self._scan(gamma)(v)

    def _scan(self, gamma: float) -> DiagonalScan:
        if gamma not in self._scans:
            self._scans[gamma] = DiagonalScan(self._K, 1.0 - gamma)
        return self._scans[gamma]
