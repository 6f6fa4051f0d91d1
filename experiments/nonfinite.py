"""Where a loss or gradient first stopped being finite."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from highway_bp.parallel.owners import from_owners


class Diverged(Exception):
    """Loss or gradient stopped being finite after step ``last_finite_step``."""

    def __init__(self, last_finite_step: int, message: str):
        super().__init__(message)
        self.last_finite_step = last_finite_step


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """Return the first parameter, in the model's order, whose gradient is not finite, or None.

    For a sharded model, all processes must call this function; all get the same name.
    """
    finite = {
        name: bool(p.grad.isfinite().all())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return next((name for name, good in from_owners(model, finite).items() if not good), None)


@torch.no_grad()
def first_nonfinite_output(model: nn.Module, x: Tensor) -> str | None:
    """Return the first module, in order of execution, whose output on x is not finite, or None."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(names.get(module, ""))

    with register_module_forward_hook(look):
        model(x)
    return next(filter(None, found), None)  # the name of the model itself is empty
