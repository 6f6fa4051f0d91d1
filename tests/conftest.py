"""One thread and one seed for every test: the same numbers in any order on any machine."""

import multiprocessing

import pytest
import torch

from tests.train_cli import runs, train  # noqa: F401  fixtures

torch.set_num_threads(1)
# What processes of tests import, once for all that `get_context("forkserver")` starts.
multiprocessing.set_forkserver_preload(
    [
        *("experiments.jobs", "experiments.run", "models.resnet", "sklearn.datasets"),
        *("models.torchvision_ops", "transformers.models.gpt2.modeling_gpt2"),
    ]
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
