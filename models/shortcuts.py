"""Parameter-free linear shortcuts that change the state's shape at the entry of a stage."""

from torch import Tensor, nn
from torch.nn import functional as F

import highway_bp as hb
from models.downsample import IRevNetDownsampling, RowDownsampling


class StridedShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros in the new channels.
    (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels

    def forward(self, h: Tensor) -> Tensor:
        extra = self.out_channels - h.shape[1]
        return F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class DownsamplingShortcut(nn.Module):
    """``down(h, 2)`` on the residual path itself."""

    def __init__(self, downsampling: RowDownsampling | IRevNetDownsampling):
        super().__init__()
        self.downsampling = downsampling

    def forward(self, h: Tensor) -> Tensor:
        return self.downsampling.down(h, 2)


def shortcut_carry(shortcut: nn.Module, h_in: Tensor) -> hb.Carry:
    """The Jacobian of a linear shortcut; the identity for ``nn.Identity``."""
    if isinstance(shortcut, nn.Identity):
        return hb.Identity()
    return hb.LinearMap(shortcut, h_in)
