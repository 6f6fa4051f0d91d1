"""Text: sequences as a function of the step, characters, byte pairs, and what wrong input says."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from experiments.data.text import TextData, load_hub_text, load_topics, windows
from experiments.data.tokens import BytePairs, Characters
from experiments.errors import UserError
from tests.experiments.hub_layout import write_split

TRAIN, TEST = "somebody/articles", "somebody/scored"
ROWS = [" = Title = \n", " the cat sat on the mat , naïvely \n", " \n", " the dog ? \n"] * 8


def text(tokens: torch.Tensor, length: int) -> TextData:
    return TextData("t", tokens, tokens, 500, length, len(tokens))


# batches


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(5, 80),
    length=st.integers(1, 4),
    size=st.integers(1, 30),
    epoch=st.integers(0, 5),
)
def test_an_epoch_predicts_every_token_at_most_once(tokens, length, size, epoch):
    total = (tokens - 1) // length
    size = min(size, total)
    batches = text(torch.arange(tokens).short(), length).train_batches(size, 2, "cpu")
    first = epoch * batches.steps_per_epoch
    taken = [batches.batch(first + step) for step in range(batches.steps_per_epoch)]
    targets = torch.cat([y for _, y in taken]).flatten().tolist()
    assert len(targets) == len(set(targets)) == length * (total - total % size)
    assert all(torch.equal(y, x + 1) and x.dtype == y.dtype == torch.int64 for x, y in taken)


def test_eval_batches_are_the_text_in_order():
    batches = list(text(torch.arange(50), 6).eval_batches(3, "cpu"))
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(48))
    assert torch.cat([y for _, y in batches]).flatten().tolist() == list(range(1, 49))


def test_windows_share_the_texts_memory():
    tokens = torch.arange(50)
    assert all(
        w.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
        for w in windows(tokens, 4)
    )


# tokens


def counted(rows, size):
    """The naive twin of `Characters`: the kept characters, and the tokens."""
    counts = Counter("".join(rows))
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:size]
    return kept, [kept.index(c) for c in "".join(rows) if c in kept]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.text(max_size=12), max_size=8), size=st.integers(1, 9))
def test_characters_equal_a_count(rows, size):
    learned = Characters.learn(rows, size)
    kept, tokens = counted(rows, size)
    assert list(learned) == kept and Characters(learned).size == len(kept)
    assert Characters(learned).encode(rows).tolist() == tokens


def test_many_characters_are_two_bytes_each():
    rows = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    for size, itemsize in ((256, 1), (300, 2)):
        assert Characters(Characters.learn(rows, size)).encode(rows).itemsize == itemsize


def test_byte_pairs_come_back_as_the_text():
    learned = BytePairs.learn(ROWS, 300)
    pairs, unseen = BytePairs(learned), " The 猫 sat…\n\ton the mat 🐱"
    assert Tokenizer.from_str(learned).decode(pairs.encode([unseen]).tolist()) == unseen
    assert 256 < pairs.size <= 300
    assert len(pairs.encode(ROWS)) < len("".join(ROWS).encode()) / 2


# files in the hub's layout


class Folder:
    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "data", root / "cache"
        for name, split, rows in ((TRAIN, "train", ROWS), (TEST, "validation", ROWS[:8])):
            write_split(self.root / name / "data", split, {"text": rows, "title": rows})

    def load(self, **changes) -> TextData:
        train = {"name": TRAIN, "config": None, "split": "train"}
        test = {"name": TEST, "config": None, "split": "validation"}
        arguments = dict(train=train, test=test, tokenizer="characters", vocabulary=15, length=4)
        arguments |= dict(root=self.root, cache_dir=self.cache)
        return load_hub_text(**(arguments | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
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


def test_the_second_load_tokenises_nothing_and_limits_count_tokens(folder, monkeypatch):
    whole = folder.load()
    for method in ("learn", "encode"):
        monkeypatch.delattr(Characters, method)
    short = folder.load(train_limit=50, eval_limit=9)
    assert torch.equal(short.train_tokens, whole.train_tokens[:50])
    assert torch.equal(short.test_tokens, whole.test_tokens[:9])
    assert short.task.characters_per_token == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 200}, r"data.length: 200, but the test text has only \d+ tokens"),
        (
            {"train": {"name": TRAIN, "config": None, "split": "train", "rows": 33}},
            "articles, split 'train' has 32 rows, 33 expected; .* or set its rows to null",
        ),
        ({"train_limit": 4}, r"data.length: 4, but the training text has only 4 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder, change, says):
    with pytest.raises(UserError, match=says) as error:
        folder.load(**change)
    assert "\n" not in str(error.value)


def test_topics_are_prose_with_a_fixed_split():
    data = load_topics("characters", 210, 32)
    assert data.vocabulary > 60 and len(data.train_tokens) > 5 * len(data.test_tokens)
    assert len(data.train_tokens) > 300_000
