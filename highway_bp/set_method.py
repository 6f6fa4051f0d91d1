"""`set_method`: one gradient method for everything in a model that takes one."""

from __future__ import annotations

from torch import nn

from highway_bp.chain import ResidualChain
from highway_bp.methods import Method
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.recurrent import Recurrent


def set_method(model: nn.Module, method: Method) -> None:
    """Set the gradient method of every chain and recurrent layer of this library in ``model``.

    Raises:
        ValueError: there is none, or one of them cannot take this method.
        TypeError: ``method`` is not a gradient method.
    """
    found = [m for m in model.modules() if isinstance(m, ResidualChain | MethodRNN | Recurrent)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no ResidualChain, GRU, LSTM or Recurrent to set "
            f"{method} on"
        )
    for module in found:
        module.method = method
