"""A residual chain whose layers are run by the processes of a group (paper, Appendix E)."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from highway_bp.chain import ChainLayer
from highway_bp.check import check_whole
from highway_bp.flow import Refused
from highway_bp.graph_check import check_graph
from highway_bp.has_method import Chain
from highway_bp.layer_call import run_layer
from highway_bp.methods import Backprop, Method
from highway_bp.parallel.agreement import check_call
from highway_bp.parallel.micro_batches import arguments_of_each, joined, sizes_of
from highway_bp.parallel.ranks import Message, Ranks, laid_out, shares_of
from highway_bp.parallel.sharded_pass import through_ranks
from highway_bp.parallel.sharded_system import CarryKind, ShardedSystem
from highway_bp.segment import Segment

SCANS = ("auto", "sequential", "doubling", "gathered")
INSIDE = (
    "a loss uses a tensor inside a layer of a ShardedChain, and would miss the layers of other "
    "processes; expected a loss on the chain's states, or a ResidualChain"
)


class ShardedChain(Chain, nn.ModuleList):
    """A `ResidualChain` whose layers are spread over processes.

    In the forward pass the state goes through the processes one after the other; in the backward
    pass all work at once. The layers of a process are one group, exact inside: with P processes,
    k iterations hold every path through at most k groups' blocks. From k = P - 1 on, the layers'
    gradients are exact; the input's gradient needs k = P. `Backprop()` is plain model parallelism.

    With micro-batches, a process works on one while the next ones are still being sent, in both
    directions. The gradient is the same, unless a layer mixes the examples of a batch (batch
    normalisation then sees a micro-batch).

    All processes build the same model, call it with the same input and call ``backward()``. All of
    them compute what comes before and after the chain, with the same gradients. Of the layers, each
    has gradients for its own only. `shard` also frees the weights of the others.

    Args:
        layers: all layers f_1 .. f_L, the same on every process.
        method: see `ResidualChain`; its ``group_size`` must be 1.
        group: the processes; None for all.
        sizes: layers per process; None for shares as equal as possible.
        scan: how carries cross processes: "sequential", "doubling" (log2 P rounds), "gathered" (one
            collective), or "auto".
        micro_batches: number of parts into which a batch is cut, along the state's first dimension.
            Tensor arguments whose first dimension has the same size are cut as well.

    Raises:
        RuntimeError: torch.distributed has not been started.
        ValueError: more processes than layers, sizes that do not add up, an unknown scan,
            ``micro_batches`` below 1.
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
        self.set_up(Backprop() if method is None else method)
        self.checked = False  # whether processes have agreed on a first state
        self.replicas: Ranks | None = None  # those with the same layers; set by `replicate`
        # Always needs a gradient: a process with no such tensor would skip the backward pass.
        self.token = torch.zeros((), requires_grad=True)
        self.kind: CarryKind | None = None  # the largest of all ranks; set by the first scan

    @property
    def own(self) -> range:
        """The layers of this process."""
        return self.shares[self.ranks.rank]

    @property
    def length(self) -> int:
        """L as methods see it: the number of processes."""
        return self.ranks.size

    def own_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this process's layers."""
        found = {id(p): p for i in self.own for p in self[i].parameters() if p.requires_grad}
        return list(found.values())

    def check_method(self, method: Method) -> None:
        super().check_method(method)
        if method.group_size not in (1, None):
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
            *args, **kwargs: passed on to every layer; gradients flow to tensors among them.
            return_states: return [h_1, ..., h_L], each of which may enter the loss.

        Returns:
            h_L, or all states, on every process.

        Raises:
            ValueError: a parameter is in layers of two processes, each of which would have a part
                of its gradient; fewer examples than micro-batches with gradients; calls on
                processes that differ in the batch's shape, the method, the mode or, until the first
                pass with gradients, in the state.
        """
        mode = "" if torch.is_grad_enabled() else ", without gradients"
        call = (
            f"a state of {h.dtype} {list(h.shape)}, {self.method}, "
            f"sizes={[len(share) for share in self.shares]}, micro_batches={self.micro_batches}"
        )
        check_call(self.ranks, call + mode, None if self.checked else h)
        with self._own_randomness(h):
            if torch.is_grad_enabled():
                if not self.checked:
                    self._check_shares()
                trained = [*self.own_parameters(), self.token]
                states = through_ranks(self, h, args, kwargs, trained, return_states)
                self.checked = True
            else:
                states = self.outputs(self.run(h, args, kwargs), return_states)
        return states if return_states else states[-1]

    def _check_shares(self) -> None:
        of_each = [{p for i in share for p in self[i].parameters()} for share in self.shares]
        if len(set().union(*of_each)) < sum(map(len, of_each)):
            raise ValueError(
                "a parameter is shared by layers of different processes; expected one process to "
                "have its whole gradient"
            )

    def run(
        self,
        h: Tensor,
        args: tuple,
        kwargs: dict,
        leaves: Sequence[Tensor] = (),
        is_solving: Callable[[], bool] = lambda: False,
    ) -> list[Segment]:
        """Run this process's layers on every micro-batch as it arrives; send each result at once.

        Args:
            leaves: the arguments and parameters that get a gradient.
            is_solving: whether this pass is being solved.
        """
        ranks, most = self.ranks, self.micro_batches
        if not torch.is_grad_enabled() and h.ndim:  # the last batch of a test set may be small
            most = max(1, min(most, len(h)))
        sizes = sizes_of(h, most)
        wants = torch.is_grad_enabled() and (h.requires_grad or not ranks.is_first)
        segments: list[Segment] = []
        sent: list[Message] = []
        arguments = arguments_of_each(args, kwargs, sizes)
        for part, each in zip(self._arriving(h.detach(), sizes), arguments, strict=True):
            if wants:
                (part,) = Refused.apply(INSIDE, is_solving, 1, part.requires_grad_(), h)
            segments.append(self.run_group(part, *each))
            if not ranks.is_last:
                out = segments[-1].h_out.detach()
                if not sent:  # the first is the largest, or as large as the others
                    ranks.send_like(out, ranks.rank + 1)
                sent.append(ranks.send(out, ranks.rank + 1))
        for message in sent:
            message.wait()
        if torch.is_grad_enabled():  # after sending: the next process waits for the state
            for segment in segments:
                self._check(segment, frozenset(map(id, leaves)))
        return segments

    def run_group(self, h: Tensor, args: tuple, kwargs: dict) -> Segment:
        """Run this process's layers as one segment that begins at h."""
        segment = Segment(h, h.requires_grad)
        for i in self.own:
            layer = ChainLayer(self[i], i, alone=len(self.own) == 1)
            call, returned = run_layer(layer, segment.end, args, kwargs, (args, kwargs))
            segment.add(call, returned)
        return segment

    def _check(self, segment: Segment, ends: frozenset) -> None:
        made: set[int] = set()
        for i, extras in enumerate(segment.extras):
            check_graph(segment, i, (), ends, made)
            if extras:
                raise RuntimeError(
                    f"{segment.calls[i].layer.name} writes into a list or dictionary that it is "
                    "given, which other processes do not see; expected it to return its state alone"
                )

    def outputs(self, segments: Sequence[Segment], every: bool) -> list[Tensor]:
        """h_L, or all states if ``every``, on all processes."""
        if every:
            held = range(len(self.own))
            owners = [rank for rank, share in enumerate(self.shares) for _ in share]
        else:
            held, owners = [-1] if self.ranks.is_last else [], [self.ranks.size - 1]
        own = [joined([s.states[i].detach() for s in segments]) for i in held]
        return self.ranks.broadcast_each(own, owners)

    def system(self, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> ShardedSystem:
        b = [None] * (len(self) - len(grads)) + list(grads)
        inside = [r for r, s in enumerate(self.shares) if any(b[i] is not None for i in s[:-1])]
        return ShardedSystem(self, segments, [b[i] for i in self.own], inside)

    def summed(self, grads: list[Tensor | None], inputs: list[Tensor | None]) -> list:
        found: list[Tensor | None] = []
        for w, like in zip(grads, inputs, strict=True):
            if like is not None:
                w = torch.zeros_like(like) if w is None else w
                w = w.clone(memory_format=torch.contiguous_format)  # raw memory is sent
                dist.all_reduce(w, group=self.ranks.group)
                w = laid_out(w, like)
            found.append(w)
        return found

    def _arriving(self, h: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        """Yield the inputs of this process's layers; the receives of all are started first."""
        ranks, source = self.ranks, self.ranks.rank - 1
        if ranks.is_first:
            yield from [h] if len(sizes) == 1 else h.split(sizes)
            return
        like = ranks.receive_like(source)
        likes = [like] if len(sizes) == 1 else [like[:size] for size in sizes]
        for message in [ranks.receive(like, source) for like in likes]:
            yield message.wait()

    @contextlib.contextmanager
    def _own_randomness(self, h: Tensor) -> Iterator[None]:
        """Make random numbers (dropout) differ between processes; afterwards they agree again."""
        seed = int(torch.randint(1 << 31, ()))  # the same on every process
        with torch.random.fork_rng([h.device] if h.is_cuda else []):
            torch.manual_seed(seed + self.ranks.rank)
            yield
