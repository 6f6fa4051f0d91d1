"""Recurrent cells for `hb.Recurrent`: examples for users who write their own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MinimalGatedCell(nn.Module):
    """The minimal gated unit (Zhou et al. 2016): h' = (1 - f) h + f tanh(W x + U (f h)).

    One gate f = sigmoid(W_f x + U_f h); the carry is diag(1 - f). x (B, I), h (B, H).
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.gate = nn.Linear(inputs + hidden, hidden)
        self.candidate = nn.Linear(inputs + hidden, hidden)

    def forget(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(torch.cat([x, h], -1)))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f = self.forget(x, h)
        return (1 - f) * h + f * torch.tanh(self.candidate(torch.cat([x, f * h], -1)))

    def carry(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return 1 - self.forget(x, before)

    def initial_state(self, B: int) -> Tensor:
        return self.gate.weight.new_zeros(B, self.hidden)


class SLSTMCell(nn.Module):
    """xLSTM's sLSTM (Beck et al. 2024), one head, exponential input gate, stabiliser m.

    The state is (c, n, m, o), (B, H) each, and the output is h = o c / n. So the gradient of a
    loss on h reaches c and n in its own step. It goes on along the forget gate, the carry of
    both. The output does not depend on m, so m gets no gradient.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)

    def pieces(self, x: Tensor, state) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return stabilised forget and input gates, m', and z and o before their activations."""
        z, i, f, o = self.gates(torch.cat([x, self.output(state)], -1)).chunk(4, -1)
        log_f, m = F.logsigmoid(f), state[2]
        m_next = torch.maximum(log_f + m, i).detach()
        return torch.exp(log_f + m - m_next), torch.exp(i - m_next), m_next, z, o

    def forward(self, x: Tensor, state):
        c, n = state[:2]
        f, i, m, z, o = self.pieces(x, state)
        return f * c + i * torch.tanh(z), f * n + i, m, torch.sigmoid(o)

    def output(self, state) -> Tensor:
        c, n, _, o = state
        return o * c / n.clamp(min=1e-6)  # n is 0 before the first step

    def carry(self, x: Tensor, before, after):
        f = self.pieces(x, before)[0]
        return f, f, None, None

    def initial_state(self, B: int):
        return tuple(self.gates.weight.new_zeros(B, self.hidden) for _ in range(4))
