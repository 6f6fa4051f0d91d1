"""Show 3: right-inverse and composition hold exactly, not to rounding."""

import pytest
import torch

from models.downsample import IRevNetDownsampling, RowDownsampling
from models.shortcuts import StridedShortcut

BOTH = pytest.mark.parametrize(
    "kind", [RowDownsampling(), IRevNetDownsampling()], ids=["rows", "irevnet"]
)


def whole(*shape: int) -> torch.Tensor:
    """Integers in float64: their means over 2 or 4 rows are exact."""
    return torch.randint(-99, 100, shape).double()


@BOTH
@pytest.mark.parametrize("s", [1, 2, 4])
def test_up_is_a_right_inverse(kind, s):
    y = whole(2, kind.channels(3, s), 4, 6)
    assert torch.equal(kind.down(kind.up(y, s), s), y)


@BOTH
@pytest.mark.parametrize("s1, s2", [(1, 2), (2, 1), (2, 2), (2, 4), (4, 2)])
def test_sizes_compose(kind, s1, s2):
    h = whole(2, 3, 16, 8)
    assert torch.equal(kind.down(kind.down(h, s1), s2), kind.down(h, s1 * s2))
    y = whole(2, kind.channels(3, s1 * s2), 2, 1)
    assert torch.equal(kind.up(kind.up(y, s2), s1), kind.up(y, s1 * s2))


@BOTH
def test_size_one_is_the_tensor_itself(kind):
    h = whole(2, 3, 4, 4)
    assert kind.down(h, 1) is h
    assert kind.up(h, 1) is h


def test_rows_are_averaged_then_flattened_offset_first_and_repeated_on_the_way_back():
    C, s = 3, 4
    h = whole(2, C, 8, 8)
    y = RowDownsampling().down(h, s)
    for j in range(s):
        for c in range(C):
            # Column j of every block, averaged over the block's s rows.
            column = sum(h[:, c, i::s, j::s] for i in range(s)) / s
            assert torch.equal(y[:, j * C + c], column)
    back = RowDownsampling().up(y, s)
    assert all(torch.equal(back[:, :, i::s], back[:, :, ::s]) for i in range(1, s))


def test_irevnet_at_size_two_takes_each_pixel_of_a_block_offset_first():
    h = whole(2, 3, 4, 6)
    y = IRevNetDownsampling().down(h, 2)
    for row in range(2):
        for column in range(2):
            first = (2 * row + column) * 3
            assert torch.equal(y[:, first : first + 3], h[:, :, row::2, column::2])


def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    h = whole(2, 4, 6, 8)
    out = StridedShortcut(8)(h)
    assert torch.equal(out[:, 2:6], h[:, :, ::2, ::2])
    assert torch.equal(out[:, [0, 1, 6, 7]], torch.zeros(2, 4, 3, 4, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("s", [2, 4])
def test_both_are_linear_and_differentiable(kind, s):
    h = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kind.up(kind.down(t, s), s), h)
