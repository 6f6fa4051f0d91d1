"""Text: sequences as a function of the step, characters, byte pairs, and what wrong input says."""

from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import text as text_module
from experiments.data.bpe import BytePairs
from experiments.data.characters import Characters
from experiments.data.text import TextData, load_hub_text
from experiments.data.text_batches import TextBatches, windows
from experiments.data.topics import load_topics
from experiments.errors import UserError
from tests.experiments.hub_layout import write_split

TRAIN, TEST = "somebody/articles", "somebody/scored"
ROWS = [" = Title = \n", " the cat sat on the mat , naïvely \n", " \n", " the dog ? \n"] * 8


# batches


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(5, 80), length=st.integers(1, 6), size=st.integers(1, 9))
def test_an_epoch_predicts_every_token_at_most_once(tokens, length, size):
    total = (tokens - 1) // length
    if total == 0:
        return
    size = min(size, total)
    batches = TextBatches(torch.arange(tokens), length, size, seed=2, device="cpu")
    taken = [batches.batch(step) for step in range(batches.steps_per_epoch)]
    targets = torch.cat([y for _, y in taken]).flatten().tolist()
    assert len(targets) == len(set(targets)) == length * (total - total % size)
    assert all(torch.equal(y, x + 1) for x, y in taken)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = torch.arange(200, dtype=torch.int16)
    first, second = (TextBatches(tokens, 7, 4, seed=1, device="cpu") for _ in range(2))
    forwards = [first.batch(step) for step in range(20)]
    torch.manual_seed(99)  # the global generator has no say
    for step in reversed(range(20)):
        assert all(
            torch.equal(*pair) for pair in zip(second.batch(step), forwards[step], strict=True)
        )
    assert not torch.equal(TextBatches(tokens, 7, 4, 2, "cpu").batch(0)[0], forwards[0][0])
    assert not torch.equal(first.batch(0)[0], first.batch(first.steps_per_epoch)[0])
    assert forwards[0][0].dtype == torch.int64


def test_eval_batches_are_the_text_in_order():
    data = TextData("t", torch.arange(50), torch.arange(50), 50, length=6, characters=50)
    batches = list(data.eval_batches(3, "cpu"))
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(48))
    assert torch.cat([y for _, y in batches]).flatten().tolist() == list(range(1, 49))


def test_windows_share_the_texts_memory():
    tokens = torch.arange(50)
    assert all(
        w.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
        for w in windows(tokens, 4)
    )


@pytest.mark.parametrize("size", [0, 13])
def test_a_batch_size_that_does_not_fit_is_told(size):
    with pytest.raises(UserError, match=f"batch_size: {size}; give 1 up to 12"):
        TextBatches(torch.arange(50), 4, size, 0, "cpu")


# characters


def counted(rows, size):
    """The naive twin of `Characters`: the kept characters, and the tokens."""
    counts = Counter("".join(rows))
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:size]
    return kept, [kept.index(c) for c in "".join(rows) if c in kept]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.text(max_size=12), max_size=8), size=st.integers(1, 9))
def test_characters_equal_a_count(rows, size):
    found = Characters(rows, size, Path("unused"))
    kept, tokens = counted(rows, size)
    assert found.characters == kept and found.vocabulary == len(kept)
    assert found.encode(rows).tolist() == tokens


def test_many_characters_are_two_bytes_each():
    rows = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    assert Characters(rows, 256, Path()).encode(rows).dtype == torch.uint8
    assert Characters(rows, 300, Path()).encode(rows).dtype == torch.int16


# byte pairs


def test_byte_pairs_come_back_as_the_text(tmp_path):
    pairs = BytePairs(ROWS, 300, tmp_path / "t.json")
    unseen = " The 猫 sat…\n\ton the mat 🐱"
    assert pairs.decode(pairs.encode([unseen])) == unseen
    assert 256 < pairs.vocabulary <= 300
    assert len(pairs.encode(ROWS)) < len("".join(ROWS).encode()) / 2


def test_byte_pairs_are_trained_once(tmp_path):
    file = tmp_path / "t.json"
    first = BytePairs(ROWS, 300, file).encode(ROWS)
    assert torch.equal(BytePairs([], 300, file).encode(ROWS), first)  # from the file alone
    file.write_text(file.read_text()[:100])
    assert torch.equal(BytePairs(ROWS, 300, file).encode(ROWS), first)  # damaged: trained again


# files in the hub's layout


class Folder:
    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "data", root / "cache"
        self.files = {}
        self.write("train", ROWS)
        self.write("validation", ROWS[:8])

    def write(self, split: str, rows: list[str]) -> None:
        name = TRAIN if split == "train" else TEST
        self.files[split] = write_split(self.root / name / "data", split, {"text": rows})

    def load(self, **changes) -> TextData:
        arguments = dict(
            train={"name": TRAIN, "config": None, "split": "train"},
            test={"name": TEST, "config": None, "split": "validation"},
            tokenizer="characters",
            vocabulary=15,
            length=4,
            root=self.root,
            cache_dir=self.cache,
        )
        return load_hub_text(**(arguments | changes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return Folder(tmp_path)


def test_the_vocabulary_is_the_training_texts(folder):
    data = folder.load()
    kept, tokens = counted(ROWS, 15)
    assert data.train_tokens.tolist() == tokens
    assert data.test_tokens.tolist() == [kept.index(c) for c in "".join(ROWS[:8]) if c in kept]
    assert data.vocabulary == 15 and data.model_arguments() == {"vocabulary": 15}
    assert data.task.metric == "eval_bits_per_char" and data.task.characters_per_token == 1
    assert data.name == f"{TRAIN}, {TEST}"


def test_words_are_scored_by_perplexity_and_know_their_characters(folder):
    data = folder.load(tokenizer="bpe", vocabulary=280)
    assert data.task.metric == "eval_perplexity"
    assert data.task.characters_per_token == len("".join(ROWS[:8])) / len(data.test_tokens) > 1.5


def test_limits_count_tokens_and_share_the_cache(folder):
    whole, short = folder.load(), folder.load(train_limit=50, eval_limit=9)
    assert torch.equal(short.train_tokens, whole.train_tokens[:50])
    assert torch.equal(short.test_tokens, whole.test_tokens[:9])
    assert len(list(folder.cache.glob("*.pt"))) == 1


def test_the_second_load_reads_the_cache_and_no_text(folder, monkeypatch):
    first = folder.load()
    monkeypatch.delattr(text_module.Split, "columns")
    assert torch.equal(folder.load().train_tokens, first.train_tokens)


def test_a_changed_text_is_tokenised_anew(folder):
    folder.load()
    folder.write("train", [*ROWS, "zzzz"])
    assert len(folder.load(vocabulary=30).train_tokens) == len("".join(ROWS)) + 4


def test_a_damaged_file_is_named(folder):
    content = bytearray(folder.files["train"].read_bytes())
    content[4:80] = bytes(76)  # the header of the first page; the index at the end stays
    folder.files["train"].write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet: half-written or damaged"):
        folder.load()


def test_a_missing_split_is_named(folder):
    folder.files["validation"].unlink()
    with pytest.raises(UserError, match=r"no validation-\*.parquet"):
        folder.load()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer": "words"}, r"data.tokenizer: 'words'; give one of characters, bpe"),
        ({"vocabulary": 0}, "data.vocabulary: 0; give a whole number"),
        ({"length": 0}, "data.length: 0; give a whole number"),
        ({"length": "long"}, "data.length: 'long'; give a whole number"),
        ({"length": 200}, r"data.length: 200, but the test text has only \d+ tokens"),
        ({"train_limit": 4}, r"data.length: 4, but the training text has only 4 tokens"),
        ({"column": "words"}, r"data.column: 'words' is not a column.*\['text'\]"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(folder, change, says):
    with pytest.raises(UserError, match=says) as told:
        folder.load(**change)
    assert "\n" not in str(told.value)


def test_topics_are_prose_with_a_fixed_split(tmp_path):
    data = load_topics("characters", 210, 32, tmp_path)
    assert data.vocabulary > 60 and len(data.train_tokens) > 5 * len(data.test_tokens)
    assert len(data.train_tokens) > 300_000
