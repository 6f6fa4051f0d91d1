"""`LSTM`: ``torch.nn.LSTM`` whose backward pass is solved by a gradient method."""

from __future__ import annotations

from torch import Tensor, nn

from highway_bp.rnn.layers import MethodRNN
from highway_bp.rnn.lstm_steps import SPLITS, LSTMCell


class LSTM(MethodRNN, nn.LSTM):
    """Drop-in for ``torch.nn.LSTM``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction are a chain over time, L the sequence length; its carry
    is the forget gate on the cell state (paper, Table 1). With ``Backprop()`` it is ``nn.LSTM``.

    Args:
        *args, **kwargs: those of ``nn.LSTM``.
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

    def _layers(self, x: Tensor, start: list[Tensor], lengths: Tensor | None):
        if lengths is not None and self.method.group_size > 1:
            raise ValueError(
                f"lengths (or a packed input) with {self.method}; expected windows of one step: "
                "the cell states inside a window are not at hand"
            )
        return super()._layers(x, start, lengths)
