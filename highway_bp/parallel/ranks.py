"""Messages between the ranks of a group, all non-blocking inside one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
CONTIGUOUS = torch.contiguous_format
NOTE = 1024  # bytes of a text that goes from rank to rank


class Ranks:
    """A group of processes in the order of their layers.

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

    @property
    def device(self) -> torch.device:
        """Where tensors are that go from rank to rank."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

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
        self.start(sends, receives).wait()

    def start(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> Underway:
        """`exchange`, but returns at once; between two ranks, messages keep their order."""
        leaving = [(t.contiguous(), to) for t, to in sends]
        arriving = [
            (t if t.is_contiguous() else torch.empty_like(t, memory_format=CONTIGUOUS), source)
            for t, source in receives
        ]
        copies = [
            (wanted, t)
            for (t, _), (wanted, _) in zip(arriving, receives, strict=True)
            if wanted is not t
        ]  # channels last
        alone = len(leaving) + len(arriving) == 1
        works = (self._one if alone else self._together)(leaving, arriving)
        return Underway([t for t, _ in leaving], works, copies)

    def _one(self, sends: list, receives: list) -> list[dist.Work]:
        """With NCCL on the two ranks' own stream, behind no message to or from a third."""
        return [
            *(dist.isend(t, group=self.group, group_dst=to) for t, to in sends),
            *(dist.irecv(t, group=self.group, group_src=source) for t, source in receives),
        ]

    def _together(self, sends: list, receives: list) -> list[dist.Work]:
        ops = [
            *(dist.P2POp(dist.isend, t, group=self.group, group_peer=to) for t, to in sends),
            *(
                dist.P2POp(dist.irecv, t, group=self.group, group_peer=source)
                for t, source in receives
            ),
        ]
        return dist.batch_isend_irecv(ops) if ops else []

    def send_note(self, text: str, to: int, device: torch.device) -> None:
        self.exchange([(_as_bytes(text, device), to)], [])

    def receive_note(self, source: int, device: torch.device) -> str:
        note = torch.zeros(NOTE, dtype=torch.uint8, device=device)
        self.exchange([], [(note, source)])
        return _as_text(note)

    def broadcast_state(self, h: Tensor, source: int) -> Tensor:
        """``h`` of rank ``source`` on every rank; of the others, its device alone counts."""
        note = _as_bytes(description(h), h.device)
        dist.broadcast(note, group=self.group, group_src=source)
        h = h.contiguous() if self.rank == source else described(_as_text(note), h.device)
        dist.broadcast(h, group=self.group, group_src=source)
        return h

    def everyone(self, value: T) -> list[T]:
        """A small value of any kind, as each rank has it."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Numbers added up over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


class Underway:
    """Messages on their way; ``sent`` is kept from being freed."""

    def __init__(
        self, sent: list[Tensor], works: list[dist.Work], copies: list[tuple[Tensor, Tensor]]
    ):
        self._sent, self._works, self._copies = sent, works, copies

    def wait(self) -> None:
        """Until all has arrived."""
        for work in self._works:
            work.wait()
        for wanted, t in self._copies:
            wanted.copy_(t)
        self._sent, self._works, self._copies = [], [], []


def description(h: Tensor) -> str:
    """dtype and shape, for one who does not know them: "float32 8 3 32 32"."""
    return " ".join([str(h.dtype).removeprefix("torch."), *map(str, h.shape)])


def described(text: str, device: torch.device) -> Tensor:
    """An empty tensor of a `description`."""
    dtype, *sizes = text.split()
    return torch.empty([int(n) for n in sizes], dtype=getattr(torch, dtype), device=device)


def _as_bytes(text: str, device: torch.device) -> Tensor:
    text = text.encode()[:NOTE].ljust(NOTE, b"\0")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _as_text(note: Tensor) -> str:
    return bytes(note.tolist()).rstrip(b"\0").decode(errors="replace")
