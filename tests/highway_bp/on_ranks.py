"""A test's function on several processes, and what it has returned on each."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(P: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returns on each of P processes, in their order.

    An exception of one of them is raised here.
    """
    mp.start_processes(_process, (P, function, folder, args), P, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(P)]


def _process(rank: int, P: int, function: Callable[..., Any], folder: Path, args: tuple) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=P)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's teardown was seen to abort a process now and then after all its work
