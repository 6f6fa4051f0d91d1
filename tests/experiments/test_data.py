"""Images: batches as a function of the step, augmentation, and what a broken download says."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.data import images as images_module
from experiments.data.augment import PADDING, Draw, draw, mirror_and_crop
from experiments.data.batches import TrainBatches, eval_batches
from experiments.data.digits import load_digits
from experiments.data.images import ImageData, channel_statistics, hold_out, load_hub_images
from experiments.errors import UserError
from tests.experiments.hub_layout import png, write_readme

NAME = "somebody/tiny"
ROWS = {"train": 12, "test": 5}


def numbered(total: int, augment: bool = False, flip: bool = False) -> ImageData:
    """Image n has the label n and random pixels: a batch tells which images it took."""
    images = torch.randint(256, (total, 3, 32, 32), dtype=torch.uint8)
    return ImageData(
        "numbered",
        images,
        torch.arange(total),
        images[:7],
        torch.arange(7),
        total,
        (0.5, 0.4, 0.3),
        (0.2, 0.3, 0.4),
        augment,
        flip,
    )


# batches


@settings(max_examples=20, deadline=None)
@given(total=st.integers(1, 30), size=st.integers(1, 30), epoch=st.integers(0, 5))
def test_an_epoch_takes_every_sample_at_most_once_and_drops_only_the_rest(total, size, epoch):
    size = min(size, total)
    batches = TrainBatches(numbered(total), size, seed=3, device="cpu")
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    taken = torch.cat([batches.batch(step)[1] for step in steps]).tolist()
    assert len(taken) == len(set(taken)) == total - total % size


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = numbered(40, augment=True, flip=True)
    first, second = (TrainBatches(data, 8, seed=1, device="cpu") for _ in range(2))
    forwards = [first.batch(step) for step in range(12)]
    torch.manual_seed(99)  # the global generator has no say
    for step in reversed(range(12)):
        x, y = second.batch(step)
        assert torch.equal(x, forwards[step][0]) and torch.equal(y, forwards[step][1])
    assert not torch.equal(TrainBatches(data, 8, 2, "cpu").batch(0)[1], forwards[0][1])


def test_epochs_are_different_permutations():
    batches = TrainBatches(numbered(40), 40, seed=0, device="cpu")
    assert not torch.equal(batches.batch(0)[1], batches.batch(1)[1])


def test_batches_are_normalised_and_keep_image_and_label_together():
    data = numbered(20)
    x, y = TrainBatches(data, 6, seed=0, device="cpu").batch(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(x, (data.train_images[y] / 255 - mean) / std)
    assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_eval_batches_are_the_test_set_in_order():
    data = numbered(20, augment=True, flip=True)
    batches = list(eval_batches(data, 3, "cpu"))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(7))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(x, (data.test_images / 255 - mean) / std)


@pytest.mark.parametrize("size", [0, -1, 21])
def test_a_batch_size_that_does_not_fit_is_told(size):
    with pytest.raises(UserError, match=f"batch_size: {size}"):
        TrainBatches(numbered(20), size, seed=0, device="cpu")


# augmentation


def test_mirror_and_crop_equals_a_loop_over_pixels():
    x = torch.randn(9, 3, 32, 32)
    chosen = draw(9, torch.Generator().manual_seed(0), True, torch.device("cpu"))
    expected = np.zeros(x.shape, dtype=np.float32)
    for sample in range(9):
        image = x[sample].numpy()
        if chosen.mirrored[sample]:
            image = image[:, :, ::-1]
        for row in range(32):
            for column in range(32):
                source_row = row + int(chosen.top[sample]) - PADDING
                source_column = column + int(chosen.left[sample]) - PADDING
                if 0 <= source_row < 32 and 0 <= source_column < 32:
                    expected[sample, :, row, column] = image[:, source_row, source_column]
    assert 0 < chosen.mirrored.sum() < 9
    np.testing.assert_array_equal(mirror_and_crop(x, chosen).numpy(), expected)


def test_no_mirror_and_the_middle_crop_leave_the_image_as_it_is():
    x = torch.randn(2, 3, 32, 32)
    middle = torch.full((2,), PADDING)
    assert torch.equal(mirror_and_crop(x, Draw(torch.zeros(2).bool(), middle, middle)), x)


def test_draws_cover_all_crops_and_mirror_half_or_none():
    many = draw(5000, torch.Generator().manual_seed(0), True, torch.device("cpu"))
    assert len({*zip(many.top.tolist(), many.left.tolist(), strict=True)}) == 81
    assert many.top.min() == 0 and many.top.max() == 2 * PADDING
    assert 0.46 < many.mirrored.float().mean() < 0.54
    assert not draw(5000, torch.Generator(), False, torch.device("cpu")).mirrored.any()


# data sets


def test_digits_are_grey_32x32_images_with_a_fixed_split():
    data = load_digits()
    assert data.train_images.shape == (1437, 3, 32, 32) and data.test_images.shape[0] == 360
    assert data.train_images.dtype == torch.uint8 and data.train_images.max() == 255
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    assert data.train_labels.unique().tolist() == list(range(10))
    assert torch.equal(data.test_labels, load_digits().test_labels)
    assert not data.flip and not data.augment


def test_channel_statistics_equal_the_plain_formula():
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean, pixels.mean(1))
    torch.testing.assert_close(std, pixels.std(1, correction=0))


def test_validation_images_are_disjoint_from_training_and_never_test_images():
    data = numbered(30)
    held = hold_out(data, 8)
    train, validation = set(held.train_labels.tolist()), set(held.test_labels.tolist())
    assert len(train) == 22 and len(validation) == 8 and train | validation == set(range(30))
    assert torch.equal(held.test_images, data.train_images[held.test_labels])
    assert torch.equal(held.test_labels, hold_out(data, 8).test_labels)
    assert hold_out(data, 0) is data


@pytest.mark.parametrize("validation", [-1, 30])
def test_a_validation_split_that_does_not_fit_is_told(validation):
    with pytest.raises(UserError, match=f"data.validation: {validation}"):
        hold_out(numbered(30), validation)


# files in the hub's layout


class Folder:
    """A small data set on disk, laid out like a repository of the hub: two train shards."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "data", root / "cache"
        self.pixels = np.random.default_rng(0).integers(256, size=(17, 32, 32, 3), dtype=np.uint8)
        self.encoded = [png(pixels) for pixels in self.pixels]
        self.labels = [("n02", "n01", "n03")[row % 3] for row in range(17)]
        self.folder = self.root / NAME
        self.shards = [
            self.folder / "plain" / name
            for name in (
                "train-00000-of-00002.parquet",
                "train-00001-of-00002.parquet",
                "test-00000-of-00001.parquet",
            )
        ]
        (self.folder / "plain").mkdir(parents=True)
        write_readme(self.folder, "plain", "plain", ("train", "test"))
        self.write()

    def write(self) -> None:
        for shard, rows in zip(self.shards, (slice(6), slice(6, 12), slice(12, 17)), strict=True):
            cells = [{"bytes": encoded, "path": None} for encoded in self.encoded[rows]]
            columns = {"image": cells, "label": self.labels[rows]}
            features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
            datasets.Dataset.from_dict(columns, features).to_parquet(shard)

    def load(self, **changes: object) -> ImageData:
        arguments = dict(
            name=NAME, config="plain", classes=3, rows=ROWS, root=self.root, cache_dir=self.cache
        )
        return load_hub_images(**(arguments | changes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return Folder(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_local_folder_is_decoded_exactly_and_strings_are_numbered_in_order(folder):
    data = folder.load()
    pixels = torch.from_numpy(folder.pixels).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images, pixels[:12])
    assert torch.equal(data.test_images, pixels[12:])
    assert data.train_labels.tolist() == [1, 0, 2] * 4
    assert data.test_labels.tolist() == [1, 0, 2, 1, 0]
    mean = folder.pixels[:12].mean((0, 1, 2)) / 255
    std = folder.pixels[:12].std((0, 1, 2)) / 255
    assert data.mean == pytest.approx(mean) and data.std == pytest.approx(std)


def test_the_second_load_reads_the_cache_and_decodes_nothing(folder, monkeypatch):
    first = folder.load()
    monkeypatch.delattr(images_module, "_decode")
    second = folder.load()
    assert torch.equal(first.train_images, second.train_images)
    assert first.mean == second.mean


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_byte_flipped(content: bytes) -> bytes:
    middle = len(content) // 2  # inside the training images
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut_off, one_byte_flipped, lambda content: b""])
def test_a_damaged_cache_file_is_built_again(folder, damage):
    first = folder.load()
    (file,) = folder.cache.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    again = folder.load()
    assert torch.equal(again.train_images, first.train_images)
    assert again.std == first.std
    assert [*folder.cache.iterdir()] == [file] and len(file.read_bytes()) == len(intact)


def test_a_changed_source_is_decoded_anew(folder):
    folder.load()
    folder.encoded[0] = png(np.full((32, 32, 3), 7, dtype=np.uint8))
    folder.write()
    assert folder.load().train_images[0].unique().tolist() == [7]


def test_an_unwritable_cache_is_told(folder):
    folder.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cache_dir"):
        folder.load()


def test_a_missing_shard_is_named(folder):
    folder.shards[1].unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: missing, one of 2 shards"):
        folder.load()


def test_a_missing_split_is_named(folder):
    folder.shards[2].unlink()
    with pytest.raises(UserError, match=r"no test-\*.parquet"):
        folder.load()


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_half_written_file_is_named(folder, keep):
    os.truncate(folder.shards[0], keep)
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: half-written or damaged"):
        folder.load()


def test_a_file_damaged_inside_is_named(folder):
    content = bytearray(folder.shards[1].read_bytes())
    content[4:2000] = bytes(1996)  # the header of the first page; the index at the end stays
    folder.shards[1].write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: half-written or damaged"):
        folder.load()


def test_a_wrong_number_of_rows_is_told(folder):
    with pytest.raises(UserError, match="'test': 5 rows, 6 expected"):
        folder.load(rows={"train": 12, "test": 6})


@pytest.mark.parametrize(
    ("encoded", "line"),
    [
        (b"no image", "'train', row 8: the image does not decode"),
        (png(np.zeros((32, 32, 3), dtype=np.uint8))[:60], "'train', row 8: the image does not"),
        (png(np.zeros((16, 32, 3), dtype=np.uint8)), "row 8: the image is 32x16 pixels"),
    ],
)
def test_a_broken_image_is_named_by_its_row(folder, encoded, line):
    folder.encoded[8] = encoded
    folder.write()
    with pytest.raises(UserError, match=line):
        folder.load()


def test_labels_that_do_not_fit_are_told(folder):
    with pytest.raises(UserError, match=r"data.classes: 4, but the training split has 3"):
        folder.load(classes=4)
    folder.labels[13] = "n09"
    folder.write()
    with pytest.raises(UserError, match="'test', row 1: label 'n09'"):
        folder.load()


def test_a_wrong_column_is_told_with_those_there_are(folder):
    with pytest.raises(UserError, match=r"data.image_column: 'img'.*\['image', 'label'\]"):
        folder.load(image_column="img")


def test_a_folder_without_its_readme_is_told(folder):
    (folder.folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"README.md included"):
        folder.load()


def test_a_root_that_is_no_folder_is_told(folder):
    with pytest.raises(UserError, match=r"data.root .*nowhere' is not a folder"):
        folder.load(root=folder.root / "nowhere")


@pytest.mark.parametrize("with_root", [True, False])
def test_without_files_and_network_it_says_what_to_download_and_where(
    folder, no_network, with_root
):
    root = folder.root if with_root else None
    with pytest.raises(UserError, match="download the repository 'somebody/other'") as caught:
        folder.load(name="somebody/other", root=root)
    where = str(root) if with_root else "$HIGHWAY_BP_DATA"
    assert f"into {where}/somebody/other" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "imagenet32", "tiny_imagenet_32"])
def test_configs_take_the_data_folder_from_the_environment(monkeypatch, name):
    file = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    monkeypatch.delenv("HIGHWAY_BP_DATA", raising=False)
    assert OmegaConf.load(file).root is None
    monkeypatch.setenv("HIGHWAY_BP_DATA", "/somewhere")
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert config["root"] == "/somewhere" and set(config["rows"]) == set(config["splits"])
