"""The planted faults still fit the code; tests/faults/plant.py sees that tests catch them."""

import subprocess

import pytest

from tests.faults.plant import REPOSITORY, patches


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.stem)
def test_a_planted_fault_fits_the_code(patch):
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=REPOSITORY, check=True)


def test_there_are_ten():
    assert len(patches()) == 10
