"""A test's function on several processes, and what it has returned on each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(
    P: int, function: Callable[..., Any], folder: Path, *args: Any, start_method: str = "spawn"
) -> list[Any]:
    """What ``function(rank, *args)`` returns on each of P processes, in their order.

    An exception of one of them is raised here.
    """
    mp.start_processes(_process, (P, function, folder, args), nprocs=P, start_method=start_method)
    return [torch.load(_file(folder, rank), weights_only=False) for rank in range(P)]


def _process(rank: int, P: int, function: Callable[..., Any], folder: Path, args: tuple) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=P)
    result = function(rank, *args)
    dist.barrier()
    leave(folder, rank, result)


def leave(folder: Path, rank: int, result: Any) -> None:
    """End this process without taking gloo's threads down.

    Its teardown was seen to abort a process now and then after all its work was done.
    """
    torch.save(result, _file(folder, rank))
    os._exit(0)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"
