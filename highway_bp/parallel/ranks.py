"""Messages between the ranks of a group, all non-blocking inside one exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONTIGUOUS = torch.contiguous_format
_HEADER = 10  # dtype, number of dimensions, up to 8 sizes


class Ranks:
    """A group of processes in the order of their layers.

    Args:
        group: a process group; None for all processes.

    Raises:
        RuntimeError: torch.distributed has not been started.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised; call init_process_group() in "
                               "processes started by torchrun")  # fmt: skip
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> None:
        """Send tensors to ranks and fill others from ranks; returns when all has arrived."""
        arrived = [t if t.is_contiguous() else torch.empty_like(t, memory_format=CONTIGUOUS)
                   for t, _ in receives]  # fmt: skip
        ops = [dist.P2POp(dist.isend, t.contiguous(), group=self.group, group_peer=to)
               for t, to in sends]
        ops += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=source)
                for t, (_, source) in zip(arrived, receives, strict=True)]  # fmt: skip
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        for t, (wanted, _) in zip(arrived, receives, strict=True):
            if wanted is not t:  # channels last
                wanted.copy_(t)

    def send_state(self, h: Tensor, to: int) -> None:
        """A tensor whose shape and dtype the receiver does not know."""
        self.exchange([(_header(h), to)], [])
        self.exchange([(h, to)], [])

    def receive_state(self, source: int, device: torch.device) -> Tensor:
        """What `send_state` sent."""
        header = torch.zeros(_HEADER, dtype=torch.int64, device=device)
        self.exchange([], [(header, source)])
        h = _like_header(header)
        self.exchange([], [(h, source)])
        return h

    def broadcast_state(self, h: Tensor, source: int) -> Tensor:
        """``h`` of rank ``source`` on every rank; of the others, its device alone counts."""
        header = _header(h)
        dist.broadcast(header, group=self.group, group_src=source)
        h = h.contiguous() if self.rank == source else _like_header(header)
        dist.broadcast(h, group=self.group, group_src=source)
        return h

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Numbers added up over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


def _header(h: Tensor) -> Tensor:
    header = torch.zeros(_HEADER, dtype=torch.int64, device=h.device)
    header[: 2 + h.ndim] = torch.tensor([_DTYPES.index(h.dtype), h.ndim, *h.shape])
    return header


def _like_header(header: Tensor) -> Tensor:
    dtype, ndim, *sizes = header.tolist()
    return torch.empty(sizes[:ndim], dtype=_DTYPES[dtype], device=header.device)
