"""Sentence pairs: batches, the hub's format, the grammar."""

import json

import pytest
import torch
from datasets import ClassLabel, Value
from tokenizers import Tokenizer

from experiments.data.grammar import load_grammar
from experiments.data.pairs import load_hub_pairs, model_input
from experiments.errors import UserError
from models.pair_classifier import PairClassifier
from models.pretrained import quiet_transformers
from tests.experiments.hub_layout import LABELS, write_split, write_tokenizer

ROWS = [
    ("a dog runs", "an animal moves", 0),
    ("a dog runs", "a red dog runs", 1),
    ("a dog runs", "nobody moves", 2),
    ("no label here", "at all", -1),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, sorted({w for p, h, _ in ROWS for w in f"{p} {h}".split()}))
    return str(folder)


def hub_folder(root, names=LABELS, rows=ROWS):
    label = Value("int64") if names is None else ClassLabel(names=names)
    premises, hypotheses, labels = map(list, zip(*rows, strict=True))
    columns = {"premise": premises, "hypothesis": hypotheses, "label": labels}
    for split in ("train", "test"):
        columns["origin"] = [split] * len(rows)  # files of one content are refused
        write_split(root / "pairs" / "data", split, columns, label=label)
    return str(root)


def load(root, tokenizer, tmp_path, **more):
    train, test = ({"name": "pairs", "config": None, "split": s} for s in ("train", "test"))
    settings = {"length": 12, "root": root, "cache_dir": str(tmp_path / "cache"), **more}
    return load_hub_pairs(train, test, tokenizer, **settings)


@pytest.mark.parametrize("names", [LABELS, None])
def test_pairs_of_the_hubs_format(tmp_path, tokenizer, names, monkeypatch):
    data = load(hub_folder(tmp_path, names), tokenizer, tmp_path)
    assert data.train_labels.tolist() == [0, 1, 2]  # the row without a label is left out
    assert data.train.shape == (3, 2, 12)
    ((x, y),) = data.eval_batches(10, "cpu")
    assert x.shape == (3, 3, 11) and y.tolist() == [2, 0, 1]  # the shortest first
    tokens, mask, _ = x[0]
    assert mask.tolist() == [1] * 9 + [0] * 2 and tokens[9:].tolist() == [1, 1]
    monkeypatch.delattr(Tokenizer, "from_str")  # the second time, nothing is tokenised
    again = load(str(tmp_path), tokenizer, tmp_path, train_limit=2)
    assert torch.equal(again.train, data.train[:2])


def test_pairs_are_tokenised_as_transformers_does(tmp_path, tokenizer):
    data = load(hub_folder(tmp_path), tokenizer, tmp_path, length=7)
    premises, hypotheses, _ = zip(*ROWS[:3], strict=True)
    how = dict(truncation=True, max_length=7, padding="max_length", return_token_type_ids=True)
    theirs = quiet_transformers().AutoTokenizer.from_pretrained(tokenizer)
    expected = theirs(list(premises), list(hypotheses), **how)
    assert data.train[:, 0].tolist() == expected["input_ids"]
    assert data.train[:, 1].tolist() == expected["token_type_ids"]


@pytest.mark.parametrize(
    ("names", "more", "line"),
    [
        (LABELS[::-1], [], r"expected \['entailment', 'neutral', 'contradiction'\]"),
        (None, [("a dog runs", "a cat", 7)], r"pairs has labels \[7\]; expected -1, 0, 1 or 2"),
        (None, [("a dog runs", None, 1)], "split 'train': hypothesis is null in 1 rows; expected"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, tokenizer, names, more, line):
    with pytest.raises(UserError, match=line):
        load(hub_folder(tmp_path, names, [*ROWS, *more]), tokenizer, tmp_path)


def test_a_split_without_labels_and_a_tokenizer_without_padding_are_refused(tmp_path, tokenizer):
    root = hub_folder(tmp_path, rows=ROWS[3:])
    with pytest.raises(UserError, match="pairs, split 'train' has no labels; expected another"):
        load(root, tokenizer, tmp_path)
    theirs = quiet_transformers().AutoTokenizer.from_pretrained(tokenizer)
    theirs.pad_token = None
    theirs.save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match="/t' has no padding token; expected one that has"):
        load(root, str(tmp_path / "t"), tmp_path)


def test_the_grammar_is_balanced_and_its_test_pairs_are_new():
    data = load_grammar(300, 90)
    assert data.train_labels.bincount().tolist() == [100] * 3
    rows = [tuple(r.flatten().tolist()) for r in torch.cat([data.train, data.test])]
    assert len(set(rows)) == 390
    x = model_input(data.test, data.padding)
    assert (x[:, 1].sum(1) == (x[:, 0] != 0).sum(1)).all()


def sizes(**more):
    return dict(
        vocabulary=40, padding=0, labels=LABELS, layers=1, hidden=8, heads=2, length=8, **more
    )


def test_a_classifier_can_be_saved_and_given_as_pretrained(tmp_path):
    x = torch.ones(2, 3, 5, dtype=torch.int64)
    model = PairClassifier(**sizes()).eval()
    model.save_pretrained(tmp_path / "m")
    again = PairClassifier(**sizes(pretrained=str(tmp_path / "m"))).eval()
    torch.testing.assert_close(again(x), model(x))


def test_a_pretrained_model_that_pads_otherwise_is_refused(tmp_path):
    """Other tokens and labels: see tests/errors.md."""
    PairClassifier(**sizes()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "roberta"
    with pytest.raises(ValueError, match="pads with token 0; expected the tokenizer's 1"):
        PairClassifier(**{**sizes(pretrained=str(tmp_path)), "padding": 1})
