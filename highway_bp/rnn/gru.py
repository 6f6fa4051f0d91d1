"""`GRU`: ``torch.nn.GRU`` whose backward pass is solved by a gradient method."""

from __future__ import annotations

from torch import nn

from highway_bp.rnn.gru_steps import GRUCell
from highway_bp.rnn.layers import MethodRNN


class GRU(MethodRNN, nn.GRU):
    """Drop-in for ``torch.nn.GRU``: same arguments, inputs, outputs and ``state_dict``.

    The states of one layer and direction are a chain over time, L the sequence length; its carry
    is the update gate (paper, Table 1). With ``Backprop()`` it is ``nn.GRU`` itself.

    Args:
        *args, **kwargs: those of ``nn.GRU``.
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
