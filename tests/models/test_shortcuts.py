"""Shortcuts that change the state's shape: values, and their Jacobian as a carry."""

import pytest
import torch
from torch import nn

import highway_bp as hb
from models.downsample import RowDownsampling
from models.shortcuts import DownsamplingShortcut, StridedShortcut, shortcut_carry


def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    h = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    out = StridedShortcut(8)(h)
    assert torch.equal(out[:, 2:6], h[:, :, ::2, ::2])
    assert torch.equal(out[:, [0, 1, 6, 7]], torch.zeros(2, 4, 3, 4, dtype=torch.float64))


def test_downsampling_shortcut_is_down_by_two():
    h = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    assert torch.equal(DownsamplingShortcut(RowDownsampling())(h), RowDownsampling().down(h, 2))


def test_the_identity_costs_no_product():
    assert isinstance(shortcut_carry(nn.Identity(), torch.zeros(1)), hb.Identity)


@pytest.mark.parametrize(
    "shortcut", [StridedShortcut(4), DownsamplingShortcut(RowDownsampling())], ids=["a", "rows"]
)
def test_carry_is_the_transpose_of_the_shortcut(shortcut):
    h = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    K = shortcut_carry(shortcut, h)
    w = torch.randn_like(shortcut(h))
    # <w, S h> = <w K, h>, and the map forgets where it was taken: it is linear.
    torch.testing.assert_close((w * shortcut(h)).sum(), (K.vecmat(w) * h).sum())
    assert torch.equal(shortcut_carry(shortcut, 0 * h).vecmat(w), K.vecmat(w))
