"""The processes of a group in the order of their layers, and messages between them.

All messages use single `isend` and `irecv` calls. With NCCL these use a stream of the two ranks'
own. Ranks that mix them with batched calls may wait for each other for ever.
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
        """The device of tensors that are sent between ranks."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def send(self, t: Tensor, to: int) -> Message:
        """Send t; returns at once. Messages between two ranks keep their order."""
        t = t.contiguous()
        return Message(dist.isend(t, group=self.group, group_dst=to), t, t)

    def receive(self, like: Tensor, source: int) -> Message:
        """Receive a tensor of the shape, dtype and layout of ``like`` (may be on device "meta")."""
        t = self._buffer(like)
        return Message(dist.irecv(t, group=self.group, group_src=source), t, like)

    def shift(self, t: Tensor, like: Tensor, senders: Container[int], by: int = 1) -> Tensor | None:
        """Send t from each rank r in ``senders`` to rank r - by. Returns what arrives, or None."""
        sends, receives = self.rank in senders and self.rank >= by, self.rank + by in senders
        sent = self.send(t, self.rank - by) if sends else None
        arrived = self.receive(like, self.rank + by).wait() if receives else None
        if sent is not None:
            sent.wait()
        return arrived

    def send_like(self, t: Tensor, to: int) -> None:
        """Send the shape, dtype and layout of t to a rank that does not know them."""
        dist.send_object_list([t.to("meta")], group=self.group, group_dst=to)

    def receive_like(self, source: int) -> Tensor:
        likes = [None]
        dist.recv_object_list(likes, group=self.group, group_src=source)
        return likes[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather a small value of any kind: returns the values of all ranks, on every rank."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_each(self, mine: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        """Broadcast the tensors of every rank to all ranks; each keeps its layout.

        Args:
            mine: the tensors of this rank.
            sources: for each tensor of the result, the rank that has it.
        """
        likes = [iter(theirs) for theirs in self.all_gather_object([t.to("meta") for t in mine])]
        own, found = iter(mine), []
        for source in sources:
            like = next(likes[source])
            t = next(own) if source == self.rank else self._buffer(like)
            # Detached, as gloo keeps what it sends for a moment, and would keep t's graph too.
            dist.broadcast(t.detach().contiguous(), group=self.group, group_src=source)
            found.append(t if source == self.rank else laid_out(t, like))
        return found

    def all_gather(self, t: Tensor) -> list[Tensor]:
        """Gather the t of all ranks, of one shape and dtype, in the layout of this rank's t."""
        everyone = [self._buffer(t) for _ in range(self.size)]
        dist.all_gather(everyone, t.contiguous(), group=self.group)
        return [laid_out(theirs, t) for theirs in everyone]

    def _buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)


class Message:
    """A tensor that is being sent or received; keeps the tensor from being freed."""

    def __init__(self, work: dist.Work, t: Tensor, like: Tensor):
        self._work, self._t, self._like = work, t, like

    def wait(self) -> Tensor:
        """Wait until the tensor has arrived or, if sent, may be written into; returns it."""
        self._work.wait()
        return laid_out(self._t, self._like)


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory layout of ``like``."""
    same = t.stride() == like.stride()
    return t if same else torch.empty_like(like, device=t.device).copy_(t)


def shares_of(L: int, P: int, sizes: Sequence[int] | None = None) -> list[range]:
    """Return the layers of every process; ValueError if they cannot be split like this."""
    if sizes is None:
        if L < P:
            raise ValueError(f"{P} processes for {L} layers; expected at most one per layer")
        sizes = [L // P + (r < L % P) for r in range(P)]
    if len(sizes) != P or sum(sizes) != L or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}; expected {P} numbers of at least 1, {L} in all")
    ends = [sum(sizes[: r + 1]) for r in range(P)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
