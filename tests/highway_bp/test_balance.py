"""Shares of layers against all there are."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import highway_bp as hb
from highway_bp.parallel.shares import shares_of


def best_of_all(seconds: list[float], P: int) -> list[int]:
    """Of all cuts: the least largest share, then the most equal counts, then larger ones first."""
    L = len(seconds)
    cuts = [
        [b - a for a, b in pairwise([0, *inner, L])] for inner in combinations(range(1, L), P - 1)
    ]

    def badness(sizes):
        shares = [seconds[share.start : share.stop] for share in shares_of(L, P, sizes)]
        return max(map(sum, shares)), sum(n * n for n in sizes), [-n for n in sizes]

    return min(cuts, key=badness)


@given(st.data())
def test_no_other_cut_is_better(data):
    seconds = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))  # sums are exact
    P = data.draw(st.integers(1, len(seconds)))
    assert hb.balanced_sizes(seconds, P) == best_of_all(seconds, P)


@given(st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=9))
def test_the_slowest_share_is_the_least_to_rounding(seconds):
    largest = [
        max(sum(seconds[share.start : share.stop]) for share in shares_of(len(seconds), 3, sizes))
        for sizes in (hb.balanced_sizes(seconds, 3), best_of_all(seconds, 3))
    ]
    assert largest[0] == pytest.approx(largest[1], rel=1e-12)


def test_equal_layers_are_shared_as_without_times():
    for L, P in ((7, 3), (200, 64), (5, 5), (6, 1)):
        assert hb.balanced_sizes([0.1] * L, P) == [len(share) for share in shares_of(L, P)]


@pytest.mark.parametrize(
    ("seconds", "P", "line"),
    [
        ([1.0, 2.0], 3, "3 processes for 2 layers; expected at most one per layer"),
        ([1.0, 2.0], 0, "P=0; expected a whole number, at least 1"),
        ([1.0, -2.0], 1, r"seconds=\[1.0, -2.0\]; expected finite numbers of at least 0"),
        ([float("nan")], 1, r"seconds=\[nan\]; expected finite numbers of at least 0"),
    ],
)
def test_what_cannot_be_shared_is_told(seconds, P, line):
    with pytest.raises(ValueError, match=line):
        hb.balanced_sizes(seconds, P)
