"""ImageNet-style folders."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.image_folder import load_image_folder
from experiments.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    for split, count, names in (
        ("train", 5, ("apple", "fig", "pear")),
        ("val", 2, ("fig", "pear")),
    ):
        for name in names:
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + i, 30, 3), 10 * len(name), np.uint8)
                pixels[:, 15:] += 3 * i
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_a_pure_function_of_seed_and_step(folder, workers):
    data = load_image_folder(str(folder), size=8, workers=workers)
    assert data.model_arguments() == {"classes": 3}
    first, second = (data.train_batches(4, 1, "cpu") for _ in range(2))
    assert first.steps_per_epoch == 3
    state = torch.get_rng_state()
    steps = [first.batch(step) for step in range(5)]  # into the second epoch
    assert torch.equal(torch.get_rng_state(), state)
    children = multiprocessing.active_children()
    assert len(children) == min(workers, os.cpu_count())
    assert all(os.getpgid(worker.pid) == worker.pid for worker in children)  # no Ctrl-C for them
    for step in (4, 4, 1, 2, 0):
        x, y = second.batch(step)
        assert torch.equal(x, steps[step][0]) and torch.equal(y, steps[step][1])
    assert x.shape == (4, 3, 8, 8) and x.dtype == torch.float32
    assert torch.equal(first.batch(5)[1], second.batch(5)[1])
    assert not torch.equal(x, data.train_batches(4, 2, "cpu").batch(0)[0])


def test_images_are_normalised_and_keep_their_label(folder):
    data = load_image_folder(str(folder), size=8, workers=1)
    x, y = map(torch.cat, zip(*data.eval_batches(3, "cpu"), strict=True))
    assert y.tolist() == [1, 1, 2, 2]  # as the training split numbers them
    value = torch.tensor([30, 30, 40, 40]) / 255
    torch.testing.assert_close(x[:, 0, 0, 0], (value - 0.485) / 0.229)


def test_what_is_wrong_with_a_folder(folder):
    for root in (None, str(folder / "nowhere")):
        with pytest.raises(UserError, match=r"data\.root: .* is not a folder"):
            load_image_folder(root)
    (folder / "val" / "plum").mkdir()
    with pytest.raises(UserError, match=r"data\.root: Found no valid file for the classes plum"):
        load_image_folder(str(folder))
    (folder / "val" / "plum" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"classes \['plum'\] are not in the training split"):
        load_image_folder(str(folder))
    (folder / "val" / "plum").rename(folder / "train" / "plum")
    for workers in (0, 1):
        data = load_image_folder(str(folder), size=8, workers=workers)
        with pytest.raises(UserError, match=r"^\S+a\.jpg: not an image \(cannot identify") as error:
            data.train_batches(len(data.train), 0, "cpu").batch(0)
        assert "\n" not in str(error.value)
