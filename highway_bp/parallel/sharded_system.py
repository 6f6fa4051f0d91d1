"""The linear system of layers on several ranks, as gradient methods see it (`LinearSystem`).

Rank r holds the layers between states r and r + 1, as one group: their block, their carry, and the
gradient w_{r+1} of their output; rank 0 also holds w_0. All ranks solve at once, by the same
method, which knows nothing about ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from highway_bp.auto_gamma import AutoGamma, smallest_block
from highway_bp.carry import Diagonal, Identity, Scalar
from highway_bp.methods import Gamma
from highway_bp.module_system import States, gamma_of, probe_generator, ratio, squares
from highway_bp.parallel import scans
from highway_bp.parallel.micro_batches import joined
from highway_bp.segment import Cotangents, Segment

if TYPE_CHECKING:
    from highway_bp.parallel.sharded_chain import ShardedChain

GATHER_BELOW = 1 << 20  # bytes of one state; for larger ones, doubling moves less data


class CarryKind(IntEnum):
    """What kind of scan across ranks a carry allows; the largest kind of all ranks counts."""

    IDENTITY = 0
    ELEMENTWISE = 1
    OTHER = 2


class ShardedSystem:
    """One rank's part. In w_0 .. w_P, the states that this rank does not hold are None.

    Args:
        segments: the rank's layers, one segment per micro-batch.
        b: cotangents of the states of the rank's layers, None where no loss arrives.
        inside: the ranks with a loss on a state between their layers.
    """

    def __init__(
        self,
        chain: ShardedChain,
        segments: Sequence[Segment],
        b: Sequence[Tensor | None],
        inside: Sequence[int],
    ):
        self._chain, self._ranks, self._rank = chain, chain.ranks, chain.ranks.rank
        self.length, self.segments = chain.ranks.size, segments
        self._sizes = [len(s.h_in) if s.h_in.ndim else 1 for s in segments]
        self._like = joined([s.h_out.detach() for s in segments])  # the state of the whole batch
        self._wanted = segments[0].wanted  # true on all ranks but perhaps the first
        nothing = [()] * len(b)
        self.b_segments = [
            Cotangents(list(parts), nothing) for parts in zip(*map(self._parts, b), strict=True)
        ]
        pairs = list(zip(segments, self.b_segments, strict=True))
        self.with_inner_losses = [s for s, b_s in pairs if s.pairs(b_s, None)]
        inner = joined([_like_input(s.inner_cotangent(b_s), s) for s, b_s in pairs])
        arrived = self._ranks.shift(inner, self._like, inside)
        out = torch.zeros_like(self._like) if b[-1] is None else b[-1]
        self._own = self._local_states(out, inner)
        self._b = self._local_states(out if arrived is None else out + arrived, inner)
        self._factors: dict[tuple, list[Tensor | None]] = {}

    def cotangents(self) -> States:
        return list(self._b)

    def own_cotangents(self) -> States:
        return list(self._own)

    def through_blocks(self, w: States, gamma: Gamma, states: range) -> States:
        v = self._down(w, 1, gamma_of(gamma, self._rank), states)
        triples = zip(w, v, self._b, strict=True)
        return [w_i if v_i is None else b_i + v_i for w_i, v_i, b_i in triples]

    def leap(self, w: States, n: int, states: range) -> States:
        """Steps of n groups (`mgrit.GridSystem`): n messages, the first n - 1 by carries alone."""
        for j in reversed(range(1, n)):
            senders = range(states.start + j, states.stop + j, states.step)
            v = self._down(w, 0, 1, senders)
            w = [w_i if v_i is None else v_i for w_i, v_i in zip(w, v, strict=True)]
        v = self._down(w, n, 1, states)
        return [v[i] for i in states]

    def scan(self, v: States, gamma: Gamma, states: range) -> States:
        if gamma == 1.0:
            return v
        n, ranks, u = states.stop - 1, self._ranks, v[self._rank + 1]  # state n + 1 is final
        shares = [1.0 - gamma_of(gamma, i) for i in range(self.length)]
        carried = partial(self._product, block=0, carry=shares[self._rank])
        scan = "sequential" if self._kind == CarryKind.OTHER else self._chain.scan
        if scan == "auto":  # small messages cost latency, large ones bandwidth
            scan = "gathered" if u.numel() * u.element_size() < GATHER_BELOW else "doubling"
        if scan == "sequential":
            u = scans.sequential(ranks, u, carried, n)
        else:
            run, prepare = {
                "doubling": (scans.doubling, scans.doubled),
                "gathered": (scans.gathered, scans.all_factors),
            }[scan]
            key = (scan, *shares)
            if key not in self._factors:
                self._factors[key] = prepare(ranks, self._factor(carried, shares))
            u = run(ranks, u, self._factors[key], n)
        return self._local_states(u, v[0] + carried(u) if ranks.is_first else None)

    def ends(self, w: States) -> Sequence[Tensor]:
        return self._parts(w[self._rank + 1])

    def _parts(self, v: Tensor | None) -> Sequence[Tensor | None]:
        """Split a state into the examples of each micro-batch."""
        whole = v is None or len(self._sizes) == 1
        return [v] * len(self._sizes) if whole else v.split(self._sizes)

    def snapshot(self, w: States) -> States:
        return w  # no call writes into what it is given

    def relative_change(self, w: States, old: States) -> float:
        both = squares(w, old)
        dist.all_reduce(both, group=self._ranks.group)
        return ratio(both)

    def smallest_blocks(self, auto: AutoGamma) -> list[float]:
        """Every rank stores the values of all ranks, so any rank can write the checkpoint."""
        return self._chain.gammas.values_for(
            auto, [str(share.start) for share in self._chain.shares], self._estimate
        )

    def _estimate(self, probes: int, seed: int) -> list[float]:
        zJ, zK = (partial(self._product, block=J, carry=K) for J, K in ((1, 0), (0, 1)))
        generator = probe_generator(self._like, seed, self._rank)
        mine, replicas = smallest_block(zJ, zK, self._like, probes, generator), self._chain.replicas
        if replicas is not None:
            mine = sum(replicas.all_gather_object(mine)) / replicas.size
        return self._ranks.all_gather_object(mine)

    def _local_states(self, output: Tensor | None, chain_input: Tensor | None) -> States:
        """w_0 .. w_P with what this rank holds: the output's state and, on the first rank, w_0."""
        w: States = [None] * (self.length + 1)
        w[self._rank + 1] = output
        if self._ranks.is_first:
            w[0] = chain_input
        return w

    def _through(self, u: Tensor, block: float, carry: float) -> Iterator[Tensor]:
        """Yield u (block J + carry K) for one micro-batch after the other."""
        for segment, u_m in zip(self.segments, self._parts(u), strict=True):
            v = segment.through(u_m, block, carry) if self._wanted else None
            yield _like_input(v, segment)

    def _product(self, u: Tensor, block: float, carry: float) -> Tensor:
        return joined([*self._through(u, block, carry)])

    def _down(self, w: States, block: float, carry: float, senders: range) -> States:
        """w (block J + carry K) from the ranks ``senders``: state i is computed on rank i and sent
        to rank i - 1, which holds it. A micro-batch is sent while the next one is computed."""
        ranks, r, own, sent, arriving = self._ranks, self._rank, [], [], []
        if r + 1 in senders:
            arriving = [ranks.receive(segment.h_out, r + 1) for segment in self.segments]
        u = torch.zeros_like(self._like) if w[r + 1] is None else w[r + 1]
        for v in self._through(u, block, carry) if r in senders else ():
            own.append(v) if ranks.is_first else sent.append(ranks.send(v, r - 1))
        for message in sent:
            message.wait()
        arrived = [message.wait() for message in arriving]
        return self._local_states(
            joined(arrived) if arrived else None, joined(own) if own else None
        )

    @cached_property
    def _kind(self) -> CarryKind:
        """The largest kind among the carries of all ranks; found by the chain's first scan."""
        chain, mine = self._chain, max(map(_carry_kind, self.segments))
        if chain.kind is None:
            chain.kind = max(self._ranks.all_gather_object(mine))
        if mine > chain.kind:
            raise RuntimeError(
                f"the carries of rank {self._rank} are of another kind (diagonal or not) than in "
                "the first backward pass; expected layers whose carry is always diagonal, or never"
            )
        return chain.kind

    def _factor(self, carried: Callable[..., Tensor], shares: list[float]) -> Tensor | None:
        """(1 - gamma) K of rank r + 1, None for the identity."""
        if self._kind == CarryKind.IDENTITY:
            share = shares[min(self._rank + 1, self.length - 1)]
            return None if set(shares) == {1.0} else self._like.new_full((1,), share)
        ones = torch.ones_like(self._like)
        arrived = self._ranks.shift(carried(ones), ones, range(self.length))
        return ones if arrived is None else arrived


def _like_input(v: Tensor | None, segment: Segment) -> Tensor:
    """v, a cotangent of the segment's input, in the dtype of that input; zeros for None."""
    h = segment.h_in
    return torch.zeros_like(h) if v is None else v.to(h.dtype)


def _carry_kind(segment: Segment) -> CarryKind:
    """Elementwise carries need one shape and dtype for all states."""
    K, h_in, h_out = segment.K, segment.h_in, segment.h_out
    if (h_in.shape, h_in.dtype) != (h_out.shape, h_out.dtype):
        return CarryKind.OTHER
    if isinstance(K, Identity):
        return CarryKind.IDENTITY
    return CarryKind.ELEMENTWISE if isinstance(K, Scalar | Diagonal) else CarryKind.OTHER
