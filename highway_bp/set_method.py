"""`set_method`: one gradient method for all chains and recurrent layers of a model."""

from torch import nn

from highway_bp.has_method import HasMethod
from highway_bp.method_state import trunks
from highway_bp.methods import Method


def set_method(model: nn.Module, method: Method) -> None:
    """Set the gradient method of every chain, converted trunk and recurrent layer in ``model``.

    The method is used from the next forward pass on.

        >>> model = nn.Sequential(hb.GRU(3, 4, method=hb.Highway(k=5)))
        >>> hb.set_method(model, hb.Backprop())
        >>> hb.current_method(model)
        Backprop()

    Raises:
        ValueError: nothing in ``model`` has a gradient method, or a part cannot use this one.
        TypeError: ``method`` is not a gradient method.
    """
    found = modules_with_method(model)
    for module in found:
        module.check_method(method)
    for module in found:
        module.method = method


def current_method(model: nn.Module) -> Method:
    """The gradient method of ``model``: that of its first module that has one.

    Raises:
        ValueError: nothing in ``model`` has a gradient method.
    """
    return modules_with_method(model)[0].method


def iterations(model: nn.Module) -> int:
    """Iterations of the slowest chain or recurrent layer in the last backward pass.

    0 with `Backprop`, whose steps are not counted, and with k = 0.

    Raises:
        ValueError: nothing in ``model`` has a gradient method.
    """
    return max(
        (
            n
            for module in modules_with_method(model)
            if module.method.group_size is not None
            for n in module.iterations
        ),
        default=0,
    )


def chain_length(model: nn.Module) -> int:
    """L of the longest chain; for a recurrent layer, the steps of its last forward pass.

    Raises:
        ValueError: nothing in ``model`` has a gradient method.
    """
    return max(module.length for module in modules_with_method(model))


def modules_with_method(model: nn.Module) -> list[HasMethod]:
    """Everything in a model that has a gradient method, at least one; ValueError for none."""
    found = [*(m for m in model.modules() if isinstance(m, HasMethod)), *trunks(model)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no hb.ResidualChain, GRU, LSTM or Recurrent, and is not "
            "converted; expected one that is: hb.convert(model, method)"
        )
    return found
