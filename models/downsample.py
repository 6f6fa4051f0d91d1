"""Downsampling around a block while the residual stream keeps one shape (paper, Appendix G).

A block at size s works on ``down(h, s)`` and returns through ``up(z, s)``, a right-inverse:
down(up(z, s), s) = z. Channels are ordered offset-major, so that down by s1 and then by s2 is down
by s1 * s2.
"""

from torch import Tensor


class RowDownsampling:
    """The paper's: average each s x s patch over its height; the s means become channels."""

    def channels(self, C: int, s: int) -> int:
        return C * s

    def down(self, h: Tensor, s: int) -> Tensor:
        """(B, C, H, W) -> (B, C s, H/s, W/s)."""
        if s == 1:
            return h
        rows = h.unflatten(2, (-1, s)).mean(3)  # (B, C, H/s, W)
        return rows.unflatten(3, (-1, s)).permute(0, 4, 1, 2, 3).flatten(1, 2)

    def up(self, z: Tensor, s: int) -> Tensor:
        """(B, C s, H/s, W/s) -> (B, C, H, W), every row repeated s times."""
        if s == 1:
            return z
        rows = z.unflatten(1, (s, -1)).permute(0, 2, 3, 4, 1).flatten(3, 4)  # (B, C, H/s, W)
        return rows.unsqueeze(3).expand(-1, -1, -1, s, -1).flatten(2, 3)


class IRevNetDownsampling:
    """i-RevNet's: each s x s patch becomes channels; invertible, widths grow by s^2.

    s must be a power of two, else ValueError: both maps work by factors of two.
    """

    def channels(self, C: int, s: int) -> int:
        return C * s * s

    def down(self, h: Tensor, s: int) -> Tensor:
        """(B, C, H, W) -> (B, C s^2, H/s, W/s)."""
        if s == 1:
            return h
        _check_power_of_two(s)
        B, C, H, W = h.shape
        # One factor of two at a time, so that composing sizes keeps one channel order.
        half = h.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return self.down(half.reshape(B, 4 * C, H // 2, W // 2), s // 2)

    def up(self, z: Tensor, s: int) -> Tensor:
        """(B, C s^2, H/s, W/s) -> (B, C, H, W), the inverse of ``down``."""
        if s == 1:
            return z
        _check_power_of_two(s)
        B, C, H, W = z.shape
        half = z.reshape(B, 2, 2, C // 4, H, W).permute(0, 3, 4, 1, 5, 2)
        return self.up(half.reshape(B, C // 4, 2 * H, 2 * W), s // 2)


def _check_power_of_two(s: int) -> None:
    if s < 1 or s & (s - 1):
        raise ValueError(f"s={s}; expected a power of two")
