"""`LSTM`: ``torch.nn.LSTM`` whose backward pass is solved by a gradient method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from highway_bp.methods import Method
from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.lstm_steps import SPLITS, LSTMCell


class LSTM(MethodRNN, nn.LSTM):
    """Drop-in for ``torch.nn.LSTM``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction are a chain over time, L the sequence length; its carry
    is the forget gate on the cell state (paper, Table 1). With ``Backprop()`` it is ``nn.LSTM``.

    Args:
        input_size, hidden_size, ..., dtype: those of ``nn.LSTM``.
        method: as of `GRU`.
        carry: "gate": a loss on h_t reaches c_t in its own step and travels along the forget
            gate; "literal": as the paper's Table 1 reads, it needs one block for that;
            "diagonal": the diagonal of the whole step's Jacobian.

    Raises:
        TypeError: ``method`` is not a gradient method.
        ValueError: an unknown ``carry``; ``proj_size`` with a method other than ``Backprop()``;
            ``lengths`` or a packed input together with windows of more than one step.
    """

    cells = {carry: LSTMCell(carry) for carry in SPLITS}  # noqa: RUF012
    n_states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: Method | None = None,
        carry: str = "gate",
    ):
        options = bias, batch_first, dropout, bidirectional, proj_size
        super().__init__(input_size, hidden_size, num_layers, *options, device=device, dtype=dtype)
        self.begin(method, carry)

    def _layers(self, x: Tensor, start: list[Tensor], lengths: Tensor | None):
        if lengths is not None and self.method.group_size > 1:
            raise ValueError(
                f"lengths (or a packed input) with {self.method}; expected windows of one step: "
                "the cell states inside a window are not at hand"
            )
        return super()._layers(x, start, lengths)
