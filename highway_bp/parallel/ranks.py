"""The processes of a group in the order of their layers, and messages between them.

All messages are lone `isend` and `irecv`: with NCCL these travel on the two ranks' own stream, and
ranks that mix them with batched ones may wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """A group of processes.

    Args:
        group: a process group; None for all processes.

    Raises:
        RuntimeError: torch.distributed has not been started.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; call init_process_group() in "
                "processes started by torchrun"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.size - 1

    @property
    def device(self) -> torch.device:
        """Where tensors are that go from rank to rank."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def send(self, t: Tensor, to: int) -> Message:
        """Returns at once; between two ranks, messages keep their order."""
        t = t.contiguous()
        return Message(dist.isend(t, group=self.group, group_dst=to), t, t)

    def receive(self, like: Tensor, source: int) -> Message:
        """A tensor of the shape, dtype and layout of ``like``, which may be on device "meta"."""
        t = self._buffer(like)
        return Message(dist.irecv(t, group=self.group, group_src=source), t, like)

    def shift(self, t: Tensor, like: Tensor, senders: Container[int], by: int = 1) -> Tensor | None:
        """t of each rank in ``senders`` to the one ``by`` before it; what arrives here, or None."""
        sends, receives = self.rank in senders and self.rank >= by, self.rank + by in senders
        sent = self.send(t, self.rank - by) if sends else None
        arrived = self.receive(like, self.rank + by).wait() if receives else None
        if sent is not None:
            sent.wait()
        return arrived

    def send_like(self, t: Tensor, to: int) -> None:
        """Shape, dtype and layout, for one who does not know them."""
        dist.send_object_list([t.to("meta")], group=self.group, group_dst=to)

    def receive_like(self, source: int) -> Tensor:
        likes = [None]
        dist.recv_object_list(likes, group=self.group, group_src=source)
        return likes[0]

    def everyone(self, value: Any) -> list[Any]:
        """A small value of any kind, as each rank has it."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def everywhere(self, mine: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        """Tensors of which each rank has its own, on all ranks, in their owners' layout.

        Args:
            mine: those of this rank.
            sources: the ranks that have the tensors, one after the other.
        """
        likes = [iter(theirs) for theirs in self.everyone([t.to("meta") for t in mine])]
        own, found = iter(mine), []
        for source in sources:
            like = next(likes[source])
            t = next(own) if source == self.rank else self._buffer(like)
            # Not t itself: gloo keeps what it sends for a moment, and with it t's graph.
            dist.broadcast(t.detach().contiguous(), group=self.group, group_src=source)
            found.append(t if source == self.rank else laid_out(t, like))
        return found

    def all(self, t: Tensor) -> list[Tensor]:
        """Tensors of one shape and dtype from all ranks, in this one's layout."""
        everyone = [self._buffer(t) for _ in range(self.size)]
        dist.all_gather(everyone, t.contiguous(), group=self.group)
        return [laid_out(theirs, t) for theirs in everyone]

    def _buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)


class Message:
    """A tensor on its way, kept from being freed."""

    def __init__(self, work: dist.Work, t: Tensor, like: Tensor):
        self._work, self._t, self._like = work, t, like

    def wait(self) -> Tensor:
        """Until it has arrived, or may be written into."""
        self._work.wait()
        return laid_out(self._t, self._like)


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory layout of ``like``."""
    same = t.stride() == like.stride()
    return t if same else torch.empty_like(like, device=t.device).copy_(t)


def shares_of(L: int, P: int, sizes: Sequence[int] | None = None) -> list[range]:
    """The layers of every process; ValueError where they cannot be shared out."""
    if sizes is None:
        if L < P:
            raise ValueError(f"{P} processes for {L} layers; expected at most one per layer")
        sizes = [L // P + (r < L % P) for r in range(P)]
    if len(sizes) != P or sum(sizes) != L or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}; expected {P} numbers of at least 1, {L} in all")
    ends = [sum(sizes[: r + 1]) for r in range(P)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
