"""What the closed forms of all cells share: slopes of gates, gradients of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

# (grad, s) -> grad * s * (1 - s) and (grad, t) -> grad * (1 - t * t): what autograd itself calls
# for s = sigmoid(a) and t = tanh(a), in one pass over memory each.
sigmoid_slope = torch.ops.aten.sigmoid_backward
tanh_slope = torch.ops.aten.tanh_backward


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """float32 for the half precisions: slopes and scans keep it, products take x's dtype."""
    return torch.promote_types(x.dtype, torch.float32)


def weight_gradients(a: Tensor, x: Tensor, biased: bool) -> list[Tensor]:
    """Gradients of W (G, I), and of the bias (G,), of x W^T + bias with cotangents a (L, B, G)."""
    W = a.flatten(0, 1).to(x.dtype).T @ x.flatten(0, 1)
    return [W, a.sum((0, 1))] if biased else [W]
