"""The linear system of one recurrent cell over time, all steps at once (`methods.LinearSystem`)."""

import os
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from highway_bp.mgrit import slice_of
from highway_bp.scan import DiagonalScan, in_blocks

SAMPLE = 64  # states whose change is measured
EVERY = slice(None)  # all steps
KERNEL = "HIGHWAY_BP_SCAN_KERNEL"  # environment variable; 0: no Triton kernel on CUDA


def scan_of(K: Tensor, scale: float, bounded: bool) -> Callable[[Tensor], Tensor]:
    """Return a scan: one Triton kernel if there is one and no product of carries can overflow, else
    `DiagonalScan`."""
    if not (has_kernel(K) and (bounded or (K.abs() <= 1).all())):
        return DiagonalScan(K, scale, bounded)
    from highway_bp.rnn.scan_kernel import scan_

    def scan(v: Tensor) -> Tensor:
        scan_(v[: len(K) + 1], K, scale)
        return v

    return scan


def has_kernel(K: Tensor) -> bool:
    """Whether the Triton kernel is used: on CUDA, if Triton is installed and `KERNEL` is not 0."""
    return K.is_cuda and os.environ.get(KERNEL) != "0" and find_spec("triton") is not None


class TimeSystem:
    """States s_0 .. s_L of a cell with diagonal carry; methods see one padded tensor.

    Calls work on all states, or on state 0 alone. States outside ``states`` are exact: a
    `through_blocks` and the `scan` after it give them the same values again. So no slices are
    copied.

    Args:
        b: cotangents from the losses on s_1 .. s_L (L, B, S).
        K: ``K()`` returns the carry's diagonals (L, B, C); called when they are first needed. They
            carry the first C elements of a state; the others go through the block alone.
        vjp: ``vjp(w, b, out, steps)`` writes b + w J into out. w (L, B, S) are the cotangents of
            s_1 .. s_L, out those of s_0 .. s_{L-1}; out may overlap w, shifted by one state. All
            three hold only the rows of ``steps``, a slice of the L steps.
        b_0: cotangent on s_0 (B, S); None for zero.
        whole: whether vjp adds w (J + K) instead of w J.
        wants_start: whether w_0 is wanted.
        bounded: whether |K| <= 1, so that no product of carries overflows.
        own: as b, without what losses inside windows send to the states before (L, B, S).
    """

    def __init__(
        self,
        b: Tensor,
        K: Callable[[], Tensor],
        vjp: Callable[[Tensor, Tensor, Tensor, slice], object],
        b_0: Tensor | None = None,
        whole: bool = False,
        wants_start: bool = True,
        bounded: bool = False,
        own: Tensor | None = None,
    ):
        self.length, self._whole, self._first = len(b), whole, 0 if wants_start else 1
        self._b, self._form_K, self._vjp, self._b_0 = b, K, vjp, b_0
        self._bounded, self._own = bounded, b if own is None else own
        self._scans: dict[float, Callable[[Tensor], Tensor]] = {}
        self._products: dict[int, Tensor] = {}

    def cotangents(self) -> Tensor:
        return self._padded(self._b)

    def own_cotangents(self) -> Tensor:
        return self._padded(self._own)

    def _padded(self, b: Tensor) -> Tensor:
        blocks, size = in_blocks(self.length)
        w = b.new_empty(blocks * size, *b.shape[1:])
        w[0] = 0.0 if self._b_0 is None else self._b_0
        w[1 : len(b) + 1] = b
        w[len(b) + 1 :] = 0.0
        return w

    def through_blocks(self, w: Tensor, gamma: float, states: range) -> Tensor:
        if states.stop <= self._first:
            return w
        L = self.length
        out = w[:L] if states.stop > 1 else torch.empty_like(w[:L])
        share = gamma - 1.0 if self._whole else gamma  # of w K, still to be added
        C = self._K.shape[-1] if share != 0.0 else 0
        carried = w[1 : L + 1, ..., :C] * self._K if C else None
        self._vjp(w[1 : L + 1], self._b_before, out, EVERY)
        if carried is not None:
            out[..., :C].add_(carried, alpha=share)
        if states.stop == 1:
            w[0] = out[0]
        return w

    def scan(self, v: Tensor, gamma: float, states: range) -> Tensor:
        if gamma == 1.0:
            return v
        if states.stop == 1:
            C = self._K.shape[-1]
            v[0, ..., :C].addcmul_(v[1, ..., :C], self._K[0], value=1.0 - gamma)
            return v
        if gamma not in self._scans:
            self._scans[gamma] = scan_of(self._K, 1.0 - gamma, self._bounded)
        return self._scans[gamma](v)

    def snapshot(self, w: Tensor) -> Tensor:
        return w[:: self._stride].clone()

    def relative_change(self, w: Tensor, old: Tensor) -> float:
        sample = w[:: self._stride]
        changed, whole = map(torch.linalg.vector_norm, (sample - old, sample))
        changed, whole = torch.stack([changed, whole]).tolist()  # one wait for a GPU
        return changed / whole if whole else 0.0

    def leap(self, w: Tensor, n: int, states: range) -> Tensor:
        """Take steps of n layers (`mgrit.GridSystem`); returns (len(states), B, S)."""
        w, at = w[slice_of(states, ahead=n)], slice_of(states)
        if n > 1:
            w_C = w[..., : self._K.shape[-1]]
            carried = torch.where(w_C == 0, 0, w_C * self._between(n, states))  # no 0 * inf
            w = F.pad(carried, (0, w.shape[-1] - carried.shape[-1]))
        v = w.new_empty(w.shape)
        self._vjp(w, torch.zeros_like(v), v, at)
        share = 1 - n if self._whole else 1  # of w K, still to be added
        if share != 0:
            K = self._K[at]
            v.mul_(n)[..., : K.shape[-1]].addcmul_(w[..., : K.shape[-1]], K, value=share)
        return v

    @property
    def _stride(self) -> int:
        """States 0, _stride, 2 _stride, ... are compared: all would cost an iteration more."""
        return max(1, self.length // SAMPLE)

    def _between(self, n: int, states: range) -> Tensor:
        """K_{i+n} ... K_{i+2} for i in ``states``, some of L - n, L - 2n, ..."""
        if n not in self._products:
            K = self._K[self.length % n :].unflatten(0, (-1, n))
            self._products[n] = K[:, 1:].prod(1)
        return self._products[n][states[0] // n : states[-1] // n + 1 : max(states.step // n, 1)]

    @cached_property
    def _b_before(self) -> Tensor:
        """b_0 .. b_{L-1} (L, B, S)."""
        first = torch.zeros_like(self._b[0]) if self._b_0 is None else self._b_0
        return torch.cat([first[None], self._b[:-1]])

    @cached_property
    def _K(self) -> Tensor:
        return self._form_K()
