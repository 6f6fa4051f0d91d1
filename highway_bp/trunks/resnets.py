"""torchvision's residual blocks: f(h) = ReLU(S h + Body(h)), S the identity or a projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from highway_bp.carry import Carry, Diagonal, RecordedMap


class TorchvisionBlock(nn.Module):
    """A BasicBlock or Bottleneck; K = S' diag(1[f(h) > 0]), S' the Jacobian of the shortcut."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor, calls: list) -> Tensor:
        return self.layer(h)

    def with_carry(self, h: Tensor, calls: list) -> tuple[Tensor, Carry]:
        layer = self.layer
        shortcut = h if layer.downsample is None else layer.downsample(h)
        out = layer.relu(self._body(h) + shortcut)
        K: Carry = Diagonal(torch.sign(out.detach()))  # 1[out > 0], as out is never negative
        if layer.downsample is not None:
            K = K @ RecordedMap(h, shortcut)
        return out, K

    def _body(self, h: Tensor) -> Tensor:
        layer = self.layer
        z = layer.relu(layer.bn1(layer.conv1(h)))
        z = layer.bn2(layer.conv2(z))
        return layer.bn3(layer.conv3(layer.relu(z))) if hasattr(layer, "conv3") else z


def torchvision_block(layer: nn.Module, index: int) -> list[nn.Module]:
    return [TorchvisionBlock(layer, index)]
