"""A residual chain whose layers are run by the processes of a group (paper, Appendix E)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.auto_gamma import GammaMemory
from highway_bp.check import check_whole
from highway_bp.methods import Backprop, Method
from highway_bp.parallel.agreement import call_of, check_call, check_state, digest
from highway_bp.parallel.ends import arrive, enter
from highway_bp.parallel.micro_batches import MicroBatches, arguments_of_each, sizes_of
from highway_bp.parallel.ranks import Ranks, Underway, described, description
from highway_bp.parallel.sharded_pass import ShardedPass, wanted
from highway_bp.parallel.shares import shares_of
from highway_bp.segment import Segment, run_segment
from highway_bp.split_check import check_split
from highway_bp.takes_method import TakesMethod

SCANS = ("auto", "sequential", "doubling", "gathered")


class ShardedChain(TakesMethod, nn.ModuleList):
    """A `ResidualChain` to whoever calls it; every process runs its own layers.

    The state goes through the processes one after the other; in the backward pass all work at
    once. The layers of a process are one group, exact inside: with P processes, k iterations hold
    every path through at most k groups. From k = P - 1 on, the layers' gradients are
    backpropagation's; that of the input needs k = P. `Backprop()` is plain model parallelism.

    With micro-batches, a process is at work on one while the next ones are still on their way to
    it, in both directions; the gradient stays what it is, unless a layer looks at the whole batch
    (batch normalisation then sees a micro-batch).

    All processes build the same model and call it with the same input, and so ``backward()``. What
    comes before and after the chain they all compute, to the same gradients; of the layers, each
    has gradients for its own. `shard` also lets go of the others' weights.

    Args:
        layers: all layers f_1 .. f_L, the same on every process.
        method: as of a `ResidualChain`; ``group_size`` stays 1.
        group: the processes; None for all.
        sizes: layers per process; None for shares as equal as can be.
        scan: how carries cross processes: "sequential", "doubling" (log2 P rounds), "gathered" (one
            collective), or "auto".
        micro_batches: parts into which a batch is cut along the first dimension of its state, and
            with it every tensor among the layers' arguments that has as many entries there.

    Raises:
        RuntimeError: torch.distributed has not been started.
        ValueError: more processes than layers, sizes that do not add up, an unknown scan,
            micro-batches that are no number of at least 1.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        method: Method | None = None,
        group: dist.ProcessGroup | None = None,
        sizes: Sequence[int] | None = None,
        scan: str = "auto",
        micro_batches: int = 1,
    ):
        super().__init__(layers)
        if scan not in SCANS:
            raise ValueError(f"scan={scan!r}; expected one of {', '.join(SCANS)}")
        check_whole("micro_batches", micro_batches, least=1)
        self.ranks, self.scan, self.micro_batches = Ranks(group), scan, micro_batches
        self.shares = shares_of(len(self), self.ranks.size, sizes)
        self.gammas = GammaMemory()
        self.iterations: list[int] = []
        self.method = Backprop() if method is None else method
        self.replicas: Ranks | None = None  # those with the same layers, as `replicate` has it
        # Some gradient always: a process without would be missing in the backward pass.
        self.token = torch.zeros((), requires_grad=True)
        self._checked = False  # carries, by the first pass
        self.kind: int | None = None  # of all carries; found by the first backward pass

    @property
    def own(self) -> range:
        """The layers of this process."""
        return self.shares[self.ranks.rank]

    @property
    def length(self) -> int:
        """L as methods see it: the number of processes."""
        return self.ranks.size

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of this process's layers that are trained."""
        found = {id(p): p for i in self.own for p in self[i].parameters() if p.requires_grad}
        return list(found.values())

    def check(self, method: Method) -> None:
        super().check(method)
        if getattr(method, "group_size", 1) != 1:
            raise ValueError(
                f"group_size={method.group_size} in a ShardedChain; expected 1, as "
                "the layers of a process are a group already"
            )

    def forward(
        self, h: Tensor, *args, return_states: bool = False, **kwargs
    ) -> Tensor | list[Tensor]:
        """Run all layers, each on its process.

        Args:
            h: the input state h_0, the same on every process.
            *args, **kwargs: passed on to every layer; no gradient flows to them.
            return_states: return [h_1, ..., h_L], each of which may enter the loss.

        Returns:
            h_L, or all states, on every process.

        Raises:
            ValueError: fewer examples than micro-batches while gradients are wanted; the process
                before this one was called with a batch of another shape, another method or mode,
                or, at first, with another state.
        """
        states = self._own_states(enter(self.ranks, h), args, kwargs, return_states)
        every = arrive(self.ranks, states, self.shares if return_states else None)
        return every if return_states else every[-1]

    def _own_states(self, x: Tensor, args: tuple, kwargs: dict, every: bool) -> list[Tensor]:
        """This process's states, or the last one alone."""
        with self._own_randomness(x):
            if not torch.is_grad_enabled():
                return wanted(self.run(x, args, kwargs), every)
            return list(
                ShardedPass.apply(self, every, args, kwargs, x, self.token, *self.own_parameters())
            )

    def run(self, x: Tensor, args: tuple, kwargs: dict) -> MicroBatches:
        """This process's layers on every micro-batch as it arrives; each goes on at once."""
        ranks, most = self.ranks, self.micro_batches
        if not torch.is_grad_enabled() and x.ndim:  # the last batch of a test set may be small
            most = max(1, min(most, len(x)))
        sizes = sizes_of(x, most)
        call = call_of(x, self.method, [len(s) for s in self.shares], self.micro_batches)
        call += f"\n{'' if self._checked else digest(x)}"
        wants = torch.is_grad_enabled() and (x.requires_grad or not ranks.is_first)
        parts: list[Segment] = []
        sent: list[Underway] = []
        for h, arguments in zip(
            self._arriving(x.detach(), sizes, call),
            arguments_of_each(args, kwargs, sizes),
            strict=True,
        ):
            parts.append(self._run_one(h.requires_grad_(wants), *arguments))
            if not ranks.is_last:
                out = parts[-1].h_out.detach()
                if len(parts) == 1:
                    ranks.send_note(f"{description(out)}\n{call}", ranks.rank + 1, out.device)
                sent.append(ranks.start([(out, ranks.rank + 1)], []))
        for message in sent:
            message.wait()
        return MicroBatches(parts)

    def _run_one(self, h: Tensor, args: tuple, kwargs: dict) -> Segment:
        layers = [self[i] for i in self.own]
        names = [f"layer {i} ({self[i]._get_name()})" for i in self.own]
        segment = run_segment(layers, names, h, args, kwargs)
        if not self._checked and torch.is_grad_enabled():
            check_split(segment)
            self._checked = True
        segment.z = None  # a hidden state of memory
        return segment

    def _arriving(self, x: Tensor, sizes: list[int], call: str) -> Iterator[Tensor]:
        """The inputs of this process's layers; all are on their way while the first is computed."""
        if self.ranks.is_first:
            yield from [x] if len(sizes) == 1 else x.split(sizes)
            return
        source = self.ranks.rank - 1
        state, *theirs = self.ranks.receive_note(source, x.device).split("\n")
        mine = call.split("\n")
        check_call(self.ranks, mine[0], theirs[0])
        if mine[1] and theirs[1]:
            check_state(self.ranks, mine[1], theirs[1])
        like = described(state, x.device)
        inputs = [like] + [like.new_empty(size, *like.shape[1:]) for size in sizes[1:]]
        underway = [self.ranks.start([], [(h, source)]) for h in inputs]
        for h, message in zip(inputs, underway, strict=True):
            message.wait()
            yield h

    @contextlib.contextmanager
    def _own_randomness(self, x: Tensor) -> Iterator[None]:
        """Dropout differs from process to process here, and nowhere behind the chain."""
        seed = int(torch.randint(1 << 31, ()))  # the same on every process
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed + self.ranks.rank)
            yield
