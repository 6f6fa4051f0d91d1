"""`set_method`: one gradient method for everything in a model that takes one."""

from __future__ import annotations

from torch import nn

from highway_bp.chain import ResidualChain
from highway_bp.methods import Method
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.recurrent import Recurrent
from highway_bp.trunks.trunk import TrunkList, TrunkSequential


def set_method(model: nn.Module, method: Method) -> None:
    """Set the gradient method of every chain, converted trunk and recurrent layer in ``model``.

    Raises:
        ValueError: there is none, or one of them cannot take this method.
        TypeError: ``method`` is not a gradient method.
    """
    found: list = []
    for module in model.modules():
        if isinstance(module, ResidualChain | MethodRNN | Recurrent):
            found.append(module)
        elif isinstance(module, TrunkList | TrunkSequential):
            found.append(module.trunk)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no ResidualChain, GRU, LSTM or Recurrent, nor is it "
            f"converted, to set {method} on"
        )
    for module in found:
        module.method = method
