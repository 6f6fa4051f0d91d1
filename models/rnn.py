"""Recurrent networks of the paper (section 4): language models, and a classifier of pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import highway_bp as hb

CELLS = {"gru": hb.GRU, "lstm": hb.LSTM}


class TokenProjection(nn.Module):
    """A linear map of one-hot tokens, as a look-up in its weight: int64 (L, B) -> (L, B, H)."""

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        bound = vocabulary**-0.5  # as nn.Linear initialises
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(hidden).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) + self.bias


class RNNLanguageModel(nn.Module):
    """Input projection, recurrent layers with residual connections around them, linear classifier.

    Args:
        vocabulary: number of tokens.
        cell: "gru" or "lstm".
        hidden: width of projection and layers.
        layers: number of layers; of several, each has a residual connection around it.
        carry: of the layers, see `hb.GRU` and `hb.LSTM`.

    Raises:
        ValueError: an unknown cell or carry.
    """

    def __init__(
        self, vocabulary: int, cell: str, hidden: int = 512, layers: int = 1, carry: str = "gate"
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell={cell!r}; expected one of {', '.join(CELLS)}")
        self.project = TokenProjection(vocabulary, hidden)
        self.layers = nn.ModuleList(CELLS[cell](hidden, hidden, carry=carry) for _ in range(layers))
        self.classify = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens int64 (B, L) -> logits of the next ones (B, L, V)."""
        h = self.project(x.T)
        for layer in self.layers:
            out, _ = layer(h)
            h = h + out if len(self.layers) > 1 else out
        return self.classify(h.transpose(0, 1))


class PixelGRU(nn.Module):
    """A GRU that reads an image pixel by pixel, row by row, then a 2-layer MLP on its last state.

    ``bias_hh`` stays zero: by the paper's count of parameters there is one bias vector per gate.
    """

    def __init__(self, classes: int, hidden: int = 64, carry: str = "gate"):
        super().__init__()
        self.project = nn.Linear(3, hidden)
        self.rnn = hb.GRU(hidden, hidden, carry=carry)
        nn.init.zeros_(self.rnn.bias_hh_l0)
        self.rnn.bias_hh_l0.requires_grad_(False)
        self.classify = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes), over a sequence of H * W steps."""
        pixels = x.flatten(2).permute(2, 0, 1)  # (H * W, B, 3)
        _, h = self.rnn(self.project(pixels))
        return self.classify(h[0])
