"""`GRU`: ``torch.nn.GRU`` whose backward pass is solved by a gradient method."""

from __future__ import annotations

import torch
from torch import nn

from highway_bp.methods import Method
from highway_bp.rnn.gru_steps import GRUCell
from highway_bp.rnn.layers import MethodRNN


class GRU(MethodRNN, nn.GRU):
    """Drop-in for ``torch.nn.GRU``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction are a chain over time, L the sequence length; its carry
    is the update gate (paper, Table 1). With ``Backprop()`` it is ``nn.GRU`` itself.

    Args:
        input_size, hidden_size, ..., dtype: those of ``nn.GRU``.
        method: ``Backprop()`` (the default), ``FixedPoint(k)``, ``Highway(k)`` or
            ``TruncatedBPTT(window)``; may be set at any time and holds from the next forward pass
            on. With ``group_size=s``, windows of s steps count as one layer, exact inside.
        carry: "gate", or "diagonal" for the diagonal of the whole step's Jacobian.

    Raises:
        TypeError: ``method`` is not a gradient method.
        ValueError: an unknown ``carry``.
    """

    cells = {carry: GRUCell(carry) for carry in ("gate", "diagonal")}  # noqa: RUF012
    n_states = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: Method | None = None,
        carry: str = "gate",
    ):
        options = bias, batch_first, dropout, bidirectional
        super().__init__(input_size, hidden_size, num_layers, *options, device=device, dtype=dtype)
        self.begin(method, carry)
