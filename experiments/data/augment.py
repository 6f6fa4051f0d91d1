"""The augmentation of He et al. (2016) as batched tensor code: mirror, then pad by 4 and crop."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = 4  # pixels on every side


@dataclass(frozen=True)
class Draw:
    """One batch's randomness. mirrored: bool (B,); top, left: int64 (B,) in 0..8."""

    mirrored: Tensor
    top: Tensor
    left: Tensor


def draw(size: int, generator: torch.Generator, flip: bool, device: torch.device) -> Draw:
    """Draws for `size` samples on the CPU, so that every device sees the same augmentation."""
    offsets = torch.randint(2 * PADDING + 1, (2, size), generator=generator)
    coins = torch.randint(2, (1, size), generator=generator) * int(flip)
    coins, top, left = torch.cat([coins, offsets]).to(device, non_blocking=True)  # one transfer
    return Draw(coins.bool(), top, left)


def mirror_and_crop(x: Tensor, draw: Draw) -> Tensor:
    """Normalised images (B, C, H, W) -> the same shape; the padding is zero, the mean colour."""
    height, width = x.shape[-2:]
    x = torch.where(draw.mirrored[:, None, None, None], x.flip(-1), x)
    padded = pad(x, (PADDING,) * 4)  # (B, C, H+8, W+8)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    samples = torch.arange(len(x), device=x.device)
    return windows[samples, :, draw.top, draw.left]  # (B, C, H, W)
