"""Images: batches as a function of the step, augmentation, and what a broken download says."""

import os
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants

from experiments.config import composed
from experiments.data import images as images_module
from experiments.data.images import (
    PADDING,
    ImageData,
    draw,
    image_data,
    load_digits,
    load_hub_images,
    mirror_and_crop,
)
from experiments.errors import UserError
from tests.experiments.hub_layout import png, write_split

NAME = "somebody/tiny"
ROWS = {"train": 12, "test": 5}


def numbered(total: int, augment: bool = False, flip: bool = False) -> ImageData:
    """Image n has the label n and random pixels: a batch shows which images it took."""
    images = torch.randint(256, (total, 3, 32, 32), dtype=torch.uint8)
    labels, mean, std = torch.arange(total), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    return ImageData(
        "numbered", images, labels, images[:7], labels[:7], total, mean, std, augment, flip
    )


# batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = numbered(40, augment=True, flip=True)
    first, second = (data.train_batches(8, 1, "cpu") for _ in range(2))
    forwards = [first.batch(step) for step in range(12)]
    torch.manual_seed(99)  # the global generator has no say
    for step in reversed(range(12)):
        x, y = second.batch(step)
        assert torch.equal(x, forwards[step][0]) and torch.equal(y, forwards[step][1])
    assert not torch.equal(data.train_batches(8, 2, "cpu").batch(0)[1], forwards[0][1])
    assert not torch.equal(forwards[5][1], forwards[0][1])  # of the next epoch


def test_batches_are_normalised_and_keep_image_and_label_together():
    data = numbered(20, flip=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    x, y = data.train_batches(6, 0, "cpu").batch(1)
    torch.testing.assert_close(x, (data.train_images[y] / 255 - mean) / std)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    x, y = map(torch.cat, zip(*numbered(20, True, True).eval_batches(3, "cpu"), strict=True))
    assert y.tolist() == list(range(7)) and x.shape == (7, 3, 32, 32)
    scored = torch.cat([x for x, _ in data.eval_batches(3, "cpu")])
    torch.testing.assert_close(scored, (data.test_images / 255 - mean) / std)


@pytest.mark.parametrize("size", [0, -1, 21])
def test_a_batch_size_that_does_not_fit_is_an_error(size):
    with pytest.raises(UserError, match=f"batch_size: {size}; give 1 up to 20, the training rows"):
        numbered(20).train_batches(size, 0, "cpu")


# augmentation


def test_mirror_and_crop_equals_a_loop_over_pixels():
    x = torch.randn(9, 3, 32, 32)
    drawn = draw(9, torch.Generator().manual_seed(0), True)
    expected = np.zeros(x.shape, dtype=np.float32)
    for sample, (mirrored, top, left) in enumerate(drawn.T.tolist()):
        image = x[sample].numpy()[:, :, :: -1 if mirrored else 1]
        for row in range(32):
            for column in range(32):
                source_row, source_column = row + top - PADDING, column + left - PADDING
                if 0 <= source_row < 32 and 0 <= source_column < 32:
                    expected[sample, :, row, column] = image[:, source_row, source_column]
    assert 0 < drawn[0].sum() < 9
    np.testing.assert_array_equal(mirror_and_crop(x, drawn).numpy(), expected)
    middle = torch.tensor([[0] * 9, [PADDING] * 9, [PADDING] * 9])
    assert torch.equal(mirror_and_crop(x, middle), x)


def test_draws_cover_all_crops_and_mirror_half_or_none():
    mirrored, top, left = draw(5000, torch.Generator().manual_seed(0), True)
    assert len({*zip(top.tolist(), left.tolist(), strict=True)}) == 81
    assert top.min() == 0 and top.max() == 2 * PADDING
    assert 0.46 < mirrored.float().mean() < 0.54
    assert not draw(5000, torch.Generator(), False)[0].any()


# data sets


def test_digits_are_grey_32x32_images_with_a_fixed_split():
    data = load_digits()
    assert data.train_images.shape == (1437, 3, 32, 32) and data.test_images.shape[0] == 360
    assert data.train_images.dtype == torch.uint8 and data.train_images.max() == 255
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    assert data.train_labels.unique().tolist() == list(range(10))
    assert torch.equal(data.test_labels, load_digits().test_labels)
    assert not data.flip and not data.augment


def test_validation_images_are_disjoint_from_training_and_never_test_images():
    images, labels = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8), torch.arange(30)

    def held(validation: int) -> ImageData:
        test = (images[:7], labels[:7])
        return image_data("held", (images, labels), test, 30, validation, False, False)

    data, whole = held(8), held(0)
    train, validation = set(data.train_labels.tolist()), set(data.test_labels.tolist())
    assert len(train) == 22 and len(validation) == 8 and train | validation == set(range(30))
    assert torch.equal(data.test_images, images[data.test_labels])
    assert torch.equal(data.test_labels, held(8).test_labels)
    assert len(whole.train_labels) == 30 and len(whole.test_labels) == 7
    assert data.mean == whole.mean and data.std == whole.std
    for wrong in (-1, 30):
        with pytest.raises(UserError, match=f"data.validation: {wrong}"):
            held(wrong)


# files in the hub's layout


class Folder:
    """A small data set on disk, laid out like a repository of the hub: two train shards."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "data", root / "cache"
        self.pixels = np.random.default_rng(0).integers(256, size=(17, 32, 32, 3), dtype=np.uint8)
        self.encoded = [png(pixels) for pixels in self.pixels]
        self.labels = [(1, 0, 2)[row % 3] for row in range(17)]
        self.write()

    def write(self) -> None:
        place, self.shards = self.root / NAME / "plain", []
        for split, rows, shard in (
            ("train", slice(6), "00000-of-00002"),
            ("train", slice(6, 12), "00001-of-00002"),
            ("test", slice(12, 17), "00000-of-00001"),
        ):
            cells = [one and {"bytes": one, "path": None} for one in self.encoded[rows]]
            columns = {"image": cells, "label": self.labels[rows]}
            file = write_split(place, split, columns, image=datasets.Image())
            self.shards.append(file.rename(place / f"{split}-{shard}.parquet"))

    def load(self, **changes: object) -> ImageData:
        arguments = dict(
            name=NAME, config="plain", classes=3, rows=ROWS, root=self.root, cache_dir=self.cache
        )
        return load_hub_images(**(arguments | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_local_folder_is_decoded_exactly_and_once(folder, monkeypatch):
    data = folder.load()
    pixels = torch.from_numpy(folder.pixels).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images, pixels[:12])
    assert torch.equal(data.test_images, pixels[12:])
    assert data.train_labels.tolist() == [1, 0, 2] * 4
    assert data.test_labels.tolist() == [1, 0, 2, 1, 0]
    assert data.mean == pytest.approx(folder.pixels[:12].mean((0, 1, 2)) / 255)
    assert data.std == pytest.approx(folder.pixels[:12].std((0, 1, 2)) / 255)
    monkeypatch.delattr(images_module.np, "stack")
    assert torch.equal(folder.load().train_images, data.train_images)


def test_labels_may_be_floats_but_none_may_be_missing(folder):
    whole = folder.load()
    folder.labels = list(map(float, folder.labels))
    folder.write()
    assert torch.equal(folder.load().train_labels, whole.train_labels)
    for column, values in (("label", folder.labels), ("image", folder.encoded)):
        kept, values[14] = values[14], None
        folder.write()
        with pytest.raises(UserError, match=f"split 'test': {column} is null in 1 rows; expected"):
            folder.load()
        values[14] = kept


@pytest.mark.parametrize(
    ("place", "config", "found"),
    [
        *(("plain", None, True), (".", "plain", True), ("data", "plain", True)),
        *(("plain", "plan", False), ("a/b", "plain", False)),
    ],
)
def test_files_of_another_config_are_not_taken(folder, place, config, found):
    (folder.root / NAME / place).mkdir(parents=True, exist_ok=True)
    for file in folder.shards:
        file.rename(folder.root / NAME / place / file.name)
    if place != "plain":
        (folder.root / NAME / "plain").rmdir()
    with nullcontext() if found else pytest.raises(UserError, match=rf"0 files {config}/train-"):
        assert len(folder.load(config=config).train_labels) == 12


def test_a_replaced_file_is_decoded_anew(folder):
    folder.load()
    folder.encoded[0] = png(np.full((32, 32, 3), 7, dtype=np.uint8))
    folder.write()
    assert folder.load().train_images[0].unique().tolist() == [7]


def test_a_cache_that_is_damaged_or_cannot_be_written_is_named(folder):
    folder.load()
    for file in folder.cache.rglob("cache-*.arrow"):
        os.truncate(file, 1000)
    with pytest.raises(
        UserError, match=rf"the data are damaged, or {folder.cache}\S+ is or cannot"
    ):
        folder.load()
    folder.cache = folder.shards[0]
    with pytest.raises(UserError, match=r"incomplete in .*train-00000-of-00002\.parquet"):
        folder.load()


@pytest.mark.parametrize(
    ("shard", "damage", "line"),
    [
        (
            1,
            Path.unlink,
            r"split 'train': incomplete in \S+/somebody/tiny \(1 files .*, 2 expected\)",
        ),
        (0, lambda file: os.truncate(file, 0), r"split 'train': incomplete in \S+ \(Parquet file"),
        (  # the header of the first page; the index at the end stays
            2,
            lambda file: file.write_bytes(b"PAR1" + bytes(1996) + file.read_bytes()[2000:]),
            r"split 'test': incomplete in \S+ \(Couldn't deserialize",
        ),
    ],
)
def test_a_missing_or_damaged_file_is_one_line(folder, capsys, shard, damage, line):
    damage(folder.shards[shard])
    with pytest.raises(UserError, match=line) as error:
        folder.load()
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoded", "line"),
    [
        (b"no image", "split 'train': cannot identify image file"),
        (png(np.zeros((32, 32, 3), dtype=np.uint8))[:60], "'train': image file is truncated"),
        (png(np.zeros((16, 32, 3), dtype=np.uint8)), "an image is 32x16 pixels, 32x32 expected"),
    ],
)
def test_a_broken_image_is_an_error(folder, encoded, line):
    folder.encoded[8] = encoded
    folder.write()
    with pytest.raises(UserError, match=line):
        folder.load()


def test_what_does_not_fit_the_configuration_is_an_error(folder):
    for changes, line in (
        ({"rows": {"train": 12, "test": 6}}, "split 'test' has 5 rows, 6 expected"),
        ({"classes": 2}, "data.classes: 2; the label 2 is none of 0..1"),
        ({"rows": {"train": 12}}, r"data.rows=\{'train': 12\}; expected numbers for train, test"),
    ):
        with pytest.raises(UserError, match=line):
            folder.load(**changes)
    with pytest.raises(ValueError, match=r"\['img'\] not in the dataset.*\['image', 'label'\]"):
        folder.load(image_column="img")


@pytest.mark.parametrize("with_root", [True, False])
def test_without_files_and_network_it_says_what_to_download_and_where(
    folder, monkeypatch, with_root
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for settings_of in (constants, datasets.config):
        monkeypatch.setattr(settings_of, "HF_HUB_OFFLINE", False)
    root = folder.root if with_root else None
    with pytest.raises(UserError, match=r"not on the hub, nor in") as error:
        folder.load(name="somebody/other", root=root)
    place = f"{folder.root if with_root else '$HIGHWAY_BP_DATA'}/somebody/other"
    assert f"nor in {place} " in str(error.value)
    assert "download train-*.parquet from the hub into that folder" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "imagenet32", "tiny_imagenet_32"])
def test_configs_take_the_data_folder_from_the_environment(monkeypatch, name):
    data = composed(f"data={name}").data
    monkeypatch.delenv("HIGHWAY_BP_DATA", raising=False)
    assert data.root is None
    monkeypatch.setenv("HIGHWAY_BP_DATA", "/somewhere")
    assert data.root == "/somewhere" and set(data.rows) == set(data.splits)
