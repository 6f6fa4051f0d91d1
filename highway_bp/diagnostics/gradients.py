"""A model's gradients by any method, and a clock for them; the model is left unchanged."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from highway_bp.method_state import load_method_state, method_state, sharded_chains
from highway_bp.methods import Method
from highway_bp.set_method import modules_with_method, set_method

Clock = Callable[[], float]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model's methods, iterations, estimates of gamma and buffers afterwards."""
    before = [(module, module.method, module.iterations) for module in modules_with_method(model)]
    memory = method_state(model)
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, method, iterations in before:
            module.method, module.iterations = method, iterations
        load_method_state(model, memory)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def gradients_of(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], method: Method
) -> dict[str, Tensor]:
    """Set the method; return gradients of the trainable parameters that the loss depends on.

    For a sharded chain, only those of this process's layers.

    Raises:
        TypeError, ValueError: the loss is no scalar tensor with a gradient; nothing is trainable;
            no gradient went through a chain or recurrent layer that ``method`` should solve.
    """
    set_method(model, method)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{type(model).__name__} has no trainable parameter; expected some")
    for module in modules_with_method(model):
        module.iterations = []
    with torch.random.fork_rng(devices=cuda_devices(model)):
        loss = checked_loss(loss_fn(model))
        # With the tokens, a process without parameters of its own takes part as well.
        tokens = [chain.token for chain in sharded_chains(model)]
        grads = torch.autograd.grad(loss, [*named.values(), *tokens], allow_unused=True)
    if method.group_size is not None and not any(
        module.iterations for module in modules_with_method(model)
    ):
        raise ValueError(
            f"no gradient went through the chains of {type(model).__name__}; expected trainable "
            "parameters before or in them, and a loss that depends on them"
        )
    return {name: g for name, g in zip(named, grads, strict=False) if g is not None}


def check_one_process(model: nn.Module, function: str) -> None:
    """Raise ValueError for a model whose layers are spread over processes."""
    if sharded_chains(model):
        raise ValueError(
            f"{type(model).__name__} has its layers on several processes; expected it "
            f"before hb.shard, as {function} measures one process"
        )


def checked_loss(loss: object) -> Tensor:
    """The loss; TypeError or ValueError unless it is a scalar that needs a gradient."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}; expected a scalar tensor")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}; expected a scalar")
    if not loss.requires_grad:
        raise ValueError(
            "the loss requires no gradient; expected one that depends on trainable parameters"
        )
    return loss


def clock_of(model: nn.Module) -> Clock:
    """A clock in seconds; each reading first waits until the model's devices have finished."""
    devices = cuda_devices(model)

    def clock() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that hold parameters of the model."""
    return list({p.device for p in model.parameters() if p.is_cuda})
