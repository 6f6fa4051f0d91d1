"""A residual chain whose layers are spread over the processes of a group (paper, Appendix E)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.auto_gamma import GammaMemory
from highway_bp.chain import parameter_step
from highway_bp.first_order import first_order
from highway_bp.methods import Backprop, Method
from highway_bp.parallel import scans
from highway_bp.parallel.ranks import Ranks
from highway_bp.parallel.sharded_system import ShardedSystem
from highway_bp.segment import run_segment
from highway_bp.split_check import check_split
from highway_bp.takes_method import TakesMethod

SCANS = ("auto", "sequential", "doubling", "gathered")
GATHER_BELOW = 1 << 20  # bytes of one state: larger ones are moved less by doubling


class ShardedChain(TakesMethod, nn.Module):
    """Every process runs its share of the layers; in the backward pass all work at once.

    The layers of a process are one group, exact inside: with P processes, k iterations hold every
    path through at most k groups, and k = P - 1 is backpropagation. `Backprop()` is plain model
    parallelism. Every process calls forward and backward, in the same order::

        h = chain(x)                                     # x is looked at on the first process
        loss = chain.on_last(h, lambda h: criterion(head(h), y))
        loss.backward()                                  # the same loss everywhere

    Args:
        layers: all layers, the same on every process; each keeps its own, under their numbers, so
            that the ``state_dict``s of all together are that of a `ResidualChain`.
        method: as of a `ResidualChain`; ``group_size`` stays 1.
        group: the processes; None for all.
        sizes: layers per process; None for shares as equal as can be.
        scan: how carries cross processes: "sequential", "doubling" (log2 P rounds), "gathered" (one
            collective), or "auto".

    Raises:
        RuntimeError: torch.distributed has not been started.
        ValueError: more processes than layers, sizes that do not add up, an unknown scan.
    """

    def __init__(self, layers: Sequence[nn.Module], method: Method | None = None,
                 group: dist.ProcessGroup | None = None, sizes: Sequence[int] | None = None,
                 scan: str = "auto"):  # fmt: skip
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"scan={scan!r}; expected one of {', '.join(SCANS)}")
        self.ranks, self.scan = Ranks(group), scan
        self.own = share_of(len(layers), self.ranks, sizes)
        for i in self.own:
            self.add_module(str(i), layers[i])
        self.gammas = GammaMemory()
        self.iterations: list[int] = []
        self.method = Backprop() if method is None else method
        self._checked = False  # carries, by the first pass
        self._kind: int | None = None  # of all carries; found by the first backward pass

    @property
    def length(self) -> int:
        """L as methods see it: the number of processes."""
        return self.ranks.size

    def check(self, method: Method) -> None:
        super().check(method)
        if getattr(method, "group_size", 1) != 1:
            raise ValueError(f"group_size={method.group_size} in a ShardedChain; expected 1, as "
                             "the layers of a process are a group already")  # fmt: skip

    def forward(self, h: Tensor, *args, return_states: bool = False, **kwargs):
        """Run this process's layers on the state of the process before.

        Args:
            h: the input h_0, on the first process; of the others, its device alone counts.
            *args, **kwargs: passed on to every layer; no gradient flows to them.
            return_states: return the states behind each of this process's layers, each of which
                may enter a loss of this process.

        Returns:
            This process's last state: h_L on the last one.
        """
        ranks = self.ranks
        if not ranks.is_first:
            h = ranks.receive_state(ranks.rank - 1, h.device).requires_grad_()
        params = [p for p in self.parameters() if p.requires_grad]
        if torch.is_grad_enabled():
            # Some gradient always: a process without would be missing in the backward pass.
            token = torch.zeros((), device=h.device, requires_grad=True)
            states = list(_ShardedChain.apply(self, args, kwargs, h, token, *params))
        else:
            states = []
            for layer in self.children():
                h = layer(h, *args, **kwargs)
                states.append(h)
        if not ranks.is_last:
            ranks.send_state(states[-1].detach(), ranks.rank + 1)
        return states if return_states else states[-1]

    def on_last(self, h: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """``loss(h)``, a number, computed on the last process and known to all.

        ``backward()`` of it starts every process's part.
        """
        last = self.ranks.size - 1
        value = loss(h) if self.ranks.is_last else torch.zeros((), device=h.device)
        known = value.detach().to(torch.float64)
        dist.broadcast(known, group=self.ranks.group, group_src=last)
        return value if self.ranks.is_last else _Known.apply(h, known.to(torch.float32))


class _Known(torch.autograd.Function):
    """A number that came from elsewhere: no gradient, yet the backward pass goes on to ``h``."""

    @staticmethod
    def forward(ctx, h, value):
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx, grad):
        return None, None


class _ShardedChain(torch.autograd.Function):
    """As `_CutChain`, of one segment, the method solving a system that spans all processes."""

    @staticmethod
    def forward(ctx, chain, args, kwargs, h, token, *params):
        with torch.enable_grad():
            layers = list(chain.children())
            names = [f"layer {i} ({layer._get_name()})" for i, layer in zip(
                chain.own, layers, strict=True)]  # fmt: skip
            ctx.segment = run_segment(layers, names, h, args, kwargs)
        if not chain._checked:
            check_split(ctx.segment)
            chain._checked = True
        ctx.segment.z = None  # a hidden state of memory
        ctx.chain, ctx.method, ctx.params = chain, chain.method, params
        ctx.set_materialize_grads(False)
        return tuple(state.detach() for state in ctx.segment.states)

    @first_order
    def backward(ctx, *b):
        chain, segment = ctx.chain, ctx.segment
        if segment is None:
            raise RuntimeError("Trying to backward through a ShardedChain a second time: its "
                               "graph is freed")  # fmt: skip
        if chain._kind is None:
            chain._kind = _largest_kind(chain.ranks, segment)
        system = ShardedSystem(chain.ranks, segment, b, chain.gammas,
                               _scan_for(chain.scan, segment.h_out), chain._kind)
        w = ctx.method.solve(system)
        grads = parameter_step([segment], [b], [w.first, w.out], ctx.params, keep=False)
        ctx.segment = None
        return None, None, None, w.first, None, *grads


def _largest_kind(ranks: Ranks, segment) -> int:
    kind = torch.tensor([scans.kind_of(segment.carry())], device=segment.h_out.device)
    dist.all_reduce(kind, dist.ReduceOp.MAX, group=ranks.group)
    return int(kind.item())


def _scan_for(scan: str, state: Tensor) -> str:
    """Small messages wait, large ones take time to move."""
    if scan != "auto":
        return scan
    return "gathered" if state.numel() * state.element_size() < GATHER_BELOW else "doubling"


def share_of(L: int, ranks: Ranks, sizes: Sequence[int] | None) -> range:
    """The layers of this process; ValueError where they cannot be shared out."""
    P = ranks.size
    if sizes is None:
        if L < P:
            raise ValueError(f"{P} processes for {L} layers; expected at most one per layer")
        sizes = [L // P + (r < L % P) for r in range(P)]
    if len(sizes) != P or sum(sizes) != L or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}; expected {P} numbers of at least 1, {L} in all")
    start = sum(sizes[: ranks.rank])
    return range(start, start + sizes[ranks.rank])
