"""A pre-LN transformer as sublayers (attention, feed-forward), for the benchmarks."""

from torch import Tensor, nn
from torch.nn import functional as F

import highway_bp as hb


class Attention(hb.ResidualLayer):
    """h + Attention(LN(h)), causal."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def block(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(hb.ResidualLayer):
    """h + W2 GELU(W1 LN(h))."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def block(self, h: Tensor) -> Tensor:
        return self.body(h)


def sublayers(n: int, width: int, heads: int) -> list[nn.Module]:
    """n sublayers, attention and feed-forward in turn."""
    return [Attention(width, heads) if i % 2 == 0 else FeedForward(width) for i in range(n)]
