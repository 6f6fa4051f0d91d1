"""How the processes of a test end."""

import os

import torch.distributed as dist


def leave() -> None:
    """End this process once all have come here, without taking gloo's threads down.

    Its teardown was seen to abort a process now and then after all its work was done.
    """
    dist.barrier()
    os._exit(0)
