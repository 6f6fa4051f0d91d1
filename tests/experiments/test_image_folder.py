"""ImageNet-style folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.image_folder import load_image_folder
from experiments.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("apple", "pear")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + i, 30, 3), 100 * label + 20, np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_batches(folder):
    data = load_image_folder(str(folder), size=8, workers=2)
    assert data.model_arguments() == {"classes": 2}
    batches = data.train_batches(3, seed=1, device="cpu")
    assert batches.steps_per_epoch == 3
    x, y = batches.batch(4)
    assert x.shape == (3, 3, 8, 8) and x.dtype == torch.float32
    other = data.train_batches(3, seed=1, device="cpu")
    other.batch(3)
    assert torch.equal(other.batch(4)[0], x)
    value = (20 + 100 * y.float()) / 255
    torch.testing.assert_close(x[:, 0, 0, 0], (value - 0.485) / 0.229)
    scored = list(data.eval_batches(3, "cpu"))
    assert [len(y) for _, y in scored] == [3, 1]
    assert torch.cat([y for _, y in scored]).tolist() == [0, 0, 1, 1]


def test_what_is_wrong_with_a_folder(folder):
    for root in (None, str(folder / "nowhere")):
        with pytest.raises(UserError, match=r"data\.root: .* is not a folder"):
            load_image_folder(root)
    (folder / "val" / "plum").mkdir()
    with pytest.raises(UserError, match=r"classes \['plum'\] are not in the training split"):
        load_image_folder(str(folder))
    (folder / "train" / "plum").mkdir()
    (folder / "train" / "plum" / "a.jpg").write_bytes(b"no image")
    data = load_image_folder(str(folder), size=8, workers=1)
    batches = data.train_batches(len(data.train), 0, "cpu")
    with pytest.raises(UserError, match=r"a\.jpg: not an image"):
        batches.batch(0)
    with pytest.raises(UserError, match="no images in folders of classes"):
        load_image_folder(str(folder), train="val", test="val/apple")
