"""One thread and one seed for every test: the same numbers in any order on any machine."""

import pytest
import torch

from tests.train_cli import runs, train  # noqa: F401  fixtures

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
