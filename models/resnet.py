"""CIFAR ResNets (He et al. 2015, 2016) whose layers are a `ResidualChain` (paper, Appendix G)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import highway_bp as hb
from models.downsample import IRevNetDownsampling, RowDownsampling
from models.shortcuts import DownsamplingShortcut, StridedShortcut, shortcut_carry

WIDTH = 16  # channels of the first stage
DOWNSAMPLINGS = ("paper", "irevnet", "shortcut", "strided")


class Resized(nn.Module):
    """up(body(down(h, s_in)), s_out): a block that works at another size than the stream."""

    def __init__(self, body: nn.Module, downsampling, s_in: int, s_out: int):
        super().__init__()
        self.body = body
        self.downsampling, self.s_in, self.s_out = downsampling, s_in, s_out

    def forward(self, h: Tensor) -> Tensor:
        z = self.body(self.downsampling.down(h, self.s_in))
        return self.downsampling.up(z, self.s_out)


class PreActLayer(hb.ResidualLayer):
    """f(h) = h + Block(h); K is the identity."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


class ShortcutLayer(nn.Module):
    """f(h) = S h + Block(h); K = S, at stage entries that have a shortcut S."""

    def __init__(self, block: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.block, self.shortcut = block, shortcut

    def forward(self, h: Tensor) -> Tensor:
        return self.shortcut(h) + self.block(h)

    def carry(self, h_in: Tensor, h_out: Tensor) -> hb.Carry:
        return shortcut_carry(self.shortcut, h_in)


class PostActLayer(ShortcutLayer):
    """f(h) = ReLU(S h + Block(h)); K = diag(1[f(h) > 0]) S. S is mostly the identity."""

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(super().forward(h))

    def carry(self, h_in: Tensor, h_out: Tensor) -> hb.Carry:
        return ReluCarry(h_out) @ super().carry(h_in, h_out)


class ReluCarry(hb.Carry):
    """diag(1[h > 0]) for h = ReLU(..), which is saved anyway: a mask would be one more tensor."""

    def __init__(self, h: Tensor):
        self.h = h

    def vecmat(self, w: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(w, self.h, 0)


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: three stages of n layers, first state 16x32x32.

    Args:
        depth: 20, 32, 44, 56, 110 or any 6n + 2; the chain has L = 3n layers.
        preact: the pre-activation form (2016); otherwise ReLU follows the sum (2015).
        classes: number of outputs.
        downsampling: "paper" and "irevnet" keep the residual stream in one shape and downsample
            around the block; "shortcut" puts the paper's downsampling on the residual path;
            "strided" is the ordinary option-A shortcut.
        in_channels: image channels.

    Raises:
        ValueError: a depth that is not 6n + 2, or an unknown downsampling.
    """

    def __init__(
        self,
        depth: int,
        preact: bool,
        classes: int,
        downsampling: str = "paper",
        in_channels: int = 3,
    ):
        super().__init__()
        if type(depth) is not int or depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth!r}; expected 6n + 2, such as 20, 32, 44, 56 or 110")
        if downsampling not in DOWNSAMPLINGS:
            raise ValueError(
                f"downsampling={downsampling!r}; expected one of {', '.join(DOWNSAMPLINGS)}"
            )
        irevnet = downsampling == "irevnet"
        self.downsampling = IRevNetDownsampling() if irevnet else RowDownsampling()
        self.keeps_shape = downsampling in ("paper", "irevnet")
        widths = [self.downsampling.channels(WIDTH, s) for s in (1, 2, 4)]
        layers = []
        for stage in range(3):
            for i in range((depth - 2) // 6):
                entry = stage > 0 and i == 0
                body = _body(preact, widths[stage - entry], widths[stage], 2 if entry else 1)
                s_in, s_out = (2 ** (stage - entry), 2**stage) if self.keeps_shape else (1, 1)
                block = Resized(body, self.downsampling, s_in, s_out)
                shortcut: nn.Module = nn.Identity()
                if entry and downsampling == "strided":
                    shortcut = StridedShortcut(widths[stage])
                elif entry and downsampling == "shortcut":
                    shortcut = DownsamplingShortcut(self.downsampling)
                if not preact:
                    layers.append(PostActLayer(block, shortcut))
                elif isinstance(shortcut, nn.Identity):
                    layers.append(PreActLayer(block))
                else:
                    layers.append(ShortcutLayer(block, shortcut))
        self.stem = nn.Sequential(_conv(in_channels, WIDTH, 1))
        self.head = nn.Sequential()
        if preact:
            self.head.extend([nn.BatchNorm2d(widths[2]), nn.ReLU()])
        else:
            self.stem.extend([nn.BatchNorm2d(WIDTH), nn.ReLU()])
        self.head.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[2], classes)])
        self.chain = hb.ResidualChain(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, 32, 32) -> logits (B, classes)."""
        h = self.chain(self.stem(x))
        return self.head(self.downsampling.down(h, 4 if self.keeps_shape else 1))


def _conv(c_in: int, c_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def _body(preact: bool, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    first, second = _conv(c_in, c_out, stride), _conv(c_out, c_out, 1)
    if preact:
        return nn.Sequential(
            nn.BatchNorm2d(c_in), nn.ReLU(), first, nn.BatchNorm2d(c_out), nn.ReLU(), second
        )
    return nn.Sequential(first, nn.BatchNorm2d(c_out), nn.ReLU(), second, nn.BatchNorm2d(c_out))
