"""The linear system of layers on several ranks, as gradient methods see it (`LinearSystem`).

Rank r holds layers between the states r and r + 1 of the groups: their block, their carry, and the
gradient w_{r+1} of its output; rank 0 holds w_0 as well. All ranks solve at once, by the same
method, which knows nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from highway_bp.auto_gamma import AutoGamma, GammaMemory
from highway_bp.carry import Scalar
from highway_bp.methods import Gamma
from highway_bp.module_system import ModuleSystem
from highway_bp.parallel import scans
from highway_bp.parallel.micro_batches import MicroBatches, joined
from highway_bp.parallel.ranks import Ranks


@dataclass(frozen=True)
class Held:
    """What a rank holds of w_0 .. w_P: w_{r+1}, and on the first rank w_0."""

    out: Tensor | None
    first: Tensor | None


class ShardedSystem:
    """One rank's part.

    Args:
        segment: the rank's layers.
        b: cotangents of the states of the rank's layers, None where no loss arrives.
        scan: "sequential", "doubling" or "gathered".
        kind: the largest `scans.kind_of` among the ranks' carries.
        replicas: the processes that have the same layers and other examples.
    """

    def __init__(
        self,
        ranks: Ranks,
        segment: MicroBatches,
        b: Sequence[Tensor | None],
        gammas: GammaMemory,
        scan: str,
        kind: int,
        replicas: Ranks | None = None,
    ):
        self.length = ranks.size
        self._ranks, self._scan, self._kind, self._gammas = ranks, scan, kind, gammas
        self._replicas = replicas
        inside, out = b[:-1], b[-1]
        nothing = [None] * len(b)
        self._local = ModuleSystem([segment], [nothing], gammas, start=ranks.rank)
        # Used for one micro-batch at a time, not as layers that follow one another.
        self._each = ModuleSystem(segment.parts, [nothing] * len(segment.parts), GammaMemory())
        self._segment = segment
        self._b = self._with_inner(segment.inner_cotangent(inside), out)
        self._factors: dict[float, list] = {}

    def _with_inner(self, inner: Tensor | None, out: Tensor | None) -> Held:
        """b_{r+1}: losses inside the run of the rank behind arrive at the state in between."""
        out = torch.zeros_like(self._segment.h_out) if out is None else out.clone()
        first = torch.zeros_like(self._segment.h_in) if inner is None else inner
        received = self._pass_down(first)
        return Held(
            out if received is None else out + received, first if self._ranks.is_first else None
        )

    def _pass_down(self, v: Tensor) -> Tensor | None:
        """Every rank's v to the rank before it; what has come from the one behind, if any."""
        ranks, received = self._ranks, torch.empty_like(self._segment.h_out)
        ranks.exchange(
            [] if ranks.is_first else [(v, ranks.rank - 1)],
            [] if ranks.is_last else [(received, ranks.rank + 1)],
        )
        return None if ranks.is_last else received

    def cotangents(self) -> Held:
        return replace(self._b)

    def through_blocks(self, w: Held, gamma: Gamma, states: range) -> Held:
        """State i is computed on rank i, behind it, and goes to rank i - 1, which holds it."""
        r = self._ranks.rank
        v = self._pushed(w.out, 1, _of(gamma, r)) if r in states else None
        return self._plus(self._b, self._handed_down(v, states), w)

    def _pushed(self, w: Tensor, n: int, gamma: float) -> Iterator[Tensor]:
        """w (n J + gamma K) of one micro-batch after the other."""
        for m, w_m in enumerate(self._segment.of_each(w)):
            v = self._each.through(m, w_m, n, gamma)
            yield torch.zeros_like(self._segment.parts[m].h_in) if v is None else v

    def _handed_down(self, v: Iterable[Tensor] | None, senders: range) -> Held:
        """What ``senders``' v have become: on each rank that of the rank behind it, None where
        that sends none; on the first rank its own as well.

        A micro-batch's v is on its way while the next one's is computed.
        """
        ranks, r, segment = self._ranks, self._ranks.rank, self._segment
        received = torch.empty_like(segment.h_out) if r + 1 in senders else None
        underway = [
            ranks.start([], [(part, r + 1)])
            for part in segment.of_each(received)
            if part is not None
        ]
        own = []
        for v_m in v or ():
            own.append(v_m)
            if r:
                underway.append(ranks.start([(v_m, r - 1)], []))
        for message in underway:
            message.wait()
        return Held(received, joined(own) if own and ranks.is_first else None)

    @staticmethod
    def _plus(b: Held, v: Held, w: Held) -> Held:
        """b + v where there is a v, w elsewhere."""
        return Held(
            w.out if v.out is None else b.out + v.out,
            w.first if v.first is None else b.first + v.first,
        )

    def scan(self, v: Held, gamma: Gamma, states: range) -> Held:
        n, ranks = states.stop - 1, self._ranks  # state n + 1 is whole, on rank n
        share = 1.0 - _of(gamma, ranks.rank)
        K = self._local.carry(0)

        def carried(u: Tensor) -> Tensor:
            return K.vecmat(u) * share

        if self._scan == "sequential" or self._kind > 2:
            out = scans.sequential(ranks, v.out, carried, self._segment.h_in, n)
        elif self._scan == "doubling":
            out = scans.doubling(ranks, v.out, self._prepared(scans.doubled, share), n)
        else:
            out = scans.gathered(ranks, v.out, self._prepared(scans.all_factors, share), n)
        return Held(out, v.first + carried(out) if ranks.is_first else v.first)

    def _prepared(self, make, share: float) -> list[scans.Factor]:
        """The factors of a scan, formed once: those of rank r + 1's carry, which it sends."""
        if share not in self._factors:
            self._factors[share] = make(self._ranks, self._incoming(share))
        return self._factors[share]

    def _incoming(self, share: float) -> scans.Factor:
        """M_r = (1 - gamma) K of rank r + 1."""
        kind = max(self._kind, 0 if share == 1.0 else 1)
        M = self._local.carry(0) @ Scalar(share) if share != 1.0 else self._local.carry(0)
        mine = scans.as_factor(M, kind, self._segment.h_in)
        if mine is None:
            return None
        received = torch.ones_like(mine if kind == 1 else self._segment.h_out)
        ranks = self._ranks
        ranks.exchange(
            [] if ranks.is_first else [(mine, ranks.rank - 1)],
            [] if ranks.is_last else [(received, ranks.rank + 1)],
        )
        return received

    # Steps of n groups, for `mgrit.MGRIT`: n messages, the first n - 1 along the carries.

    def copy(self, w: Held) -> Held:
        return w  # no call writes into what it is given

    def relax(self, w: Held, b: Held, n: int, states: range) -> Held:
        return self._plus(b, self._leapt(w, n, states), w)

    def residual(self, w: Held, b: Held, n: int, states: range) -> Held:
        v = self._leapt(w, n, states)
        return Held(_rest(b.out, v.out, w.out), _rest(b.first, v.first, w.first))

    def add(self, w: Held, e: Held) -> Held:
        return self._plus(w, e, w)

    def _leapt(self, w: Held, n: int, states: range) -> Held:
        """w_{i+n} A_i(n) for i in ``states``; None elsewhere."""
        r, u, like = self._ranks.rank, w.out, self._segment.h_in
        for j in reversed(range(1, n)):
            senders = range(states.start + j, states.stop + j, states.step)
            v = self._local.carry(0).vecmat(u).to(like.dtype) if r in senders else None
            received = self._handed_down(
                self._segment.of_each(v) if r in senders else None, senders
            ).out
            u = u if received is None else received
        return self._handed_down(self._pushed(u, n, 1) if r in states else None, states)

    def keep(self, w: Held) -> Held:
        return w  # no call writes into what it is given

    def change(self, w: Held, kept: Held) -> float:
        pairs = [(a, b) for a, b in ((w.out, kept.out), (w.first, kept.first)) if a is not None]
        squares = [
            sum(float(torch.linalg.vector_norm(t) ** 2) for t in tensors)
            for tensors in ([a - b for a, b in pairs], [a for a, _ in pairs])
        ]
        changed, whole = self._ranks.sum(squares, w.out.device)
        return math.sqrt(changed / whole) if whole else 0.0

    def smallest_blocks(self, auto: AutoGamma) -> list[float]:
        """Every rank keeps those of all: so whose chain goes into a checkpoint does not matter."""
        return self._gammas.values_for(auto, self.length, self._estimate)

    def _estimate(self, probes: int, seed: int) -> list[float]:
        (mine,) = self._local.estimate(probes, seed)
        if self._replicas is not None:
            (total,) = self._replicas.sum([mine], self._segment.h_out.device)
            mine = total / self._replicas.size
        return self._ranks.everyone(mine)


def _rest(b: Tensor | None, v: Tensor | None, w: Tensor | None) -> Tensor | None:
    """b + v - w, and zero where there is no v."""
    if v is None:
        return None if w is None else torch.zeros_like(w)
    return b + v - w


def _of(gamma: Gamma, i: int) -> float:
    return gamma[i] if isinstance(gamma, list) else gamma
