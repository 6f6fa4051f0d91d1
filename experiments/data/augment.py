"""Batches of images as a network sees them: normalised, and augmented as in He et al. (2016)."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = 4  # pixels on every side


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) -> float32; mean, std: of each channel, in units where white is 1."""
    mean, std = _pixel_statistics(mean, std, images.device)
    return images.float().sub_(mean).div_(std)


@cache  # so that only the first batch waits for a transfer
def _pixel_statistics(mean: tuple, std: tuple, device: torch.device) -> Tensor:
    """Return float32 (2, C, 1, 1), in units where white is 255."""
    return (255 * torch.tensor([mean, std])).to(device)[..., None, None]


def draw(size: int, generator: torch.Generator, flip: bool) -> Tensor:
    """Draw int64 (3, B), always on the CPU: mirrored (0 or 1), top and left (0..8)."""
    offsets = torch.randint(2 * PADDING + 1, (2, size), generator=generator)
    return torch.cat([torch.randint(2, (1, size), generator=generator) * int(flip), offsets])


def mirror_and_crop(x: Tensor, drawn: Tensor) -> Tensor:
    """Normalised images (B, C, H, W), mirrored, padded with the mean colour and cropped back."""
    height, width = x.shape[-2:]
    mirrored, top, left = drawn.to(x.device, non_blocking=True)  # one transfer
    x = torch.where(mirrored.bool()[:, None, None, None], x.flip(-1), x)
    padded = pad(x, (PADDING,) * 4)  # (B, C, H+8, W+8)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    samples = torch.arange(len(x), device=x.device)
    return windows[samples, :, top, left]  # (B, C, H, W)
