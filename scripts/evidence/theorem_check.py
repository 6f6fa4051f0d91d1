"""Check Theorems 1 and 2 in float64: compare the library with sums over paths and autograd."""

from itertools import combinations

import torch
from torch import Tensor, nn

import highway_bp as hb


class Layer(nn.Module):
    """h + tanh(A h), with the identity as residual path."""

    def __init__(self, width: int):
        super().__init__()
        self.A = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.A(h))


def path_sum(b: Tensor, blocks: list[Tensor], k: int) -> Tensor:
    """The input's gradient over paths of at most k blocks; b (H,), blocks (H, H) each, K = I."""
    total = torch.zeros_like(b)
    for size in range(k + 1):
        for path in combinations(reversed(blocks), size):
            w = b
            for J in path:
                w = w @ J
            total += w
    return total


def largest_error() -> float:
    """Largest difference from the sum over paths (k = 0 .. L), and from autograd (k = L)."""
    L, width = 6, 4
    torch.manual_seed(0)
    layers = [Layer(width).double() for _ in range(L)]
    chain = hb.ResidualChain(layers)
    x = torch.randn(width, dtype=torch.float64, requires_grad=True)
    states = [x.detach(), *chain(x.detach(), return_states=True)]
    blocks = [
        torch.autograd.functional.jacobian(lambda h, f=f: f(h) - h, h)
        for f, h in zip(layers, states[:-1], strict=True)
    ]

    def gradient(method: hb.Method) -> Tensor:
        chain.method = method
        return torch.autograd.grad(chain(x).square().sum(), x)[0]

    b = 2 * states[-1].detach()
    sums = [gradient(hb.Highway(k)) - path_sum(b, blocks, k) for k in range(L + 1)]
    exact = gradient(hb.Highway(L)) - gradient(hb.Backprop())
    return torch.stack([*sums, exact]).abs().max().item()
