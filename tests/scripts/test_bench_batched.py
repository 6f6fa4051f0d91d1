"""The benchmark of batched sublayers: both ways give the same products, and both are timed."""

import pytest

from scripts import bench_batched


@pytest.mark.parametrize("kind", ["attention", "feed-forward"])
def test_both_ways_agree_and_are_timed(kind):
    seconds = bench_batched.measure(kind, B=1, T=4, D=8, heads=2, repeats=2)
    assert set(seconds) == {"one_by_one", "batched"}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
