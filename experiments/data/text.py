"""Text for language models: data sets in the hub's layout, and one without a download."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.batches import Batch, Device, TensorData
from experiments.data.source import concatenated, load_rows, map_cached
from experiments.data.tokens import TOKENIZERS, tokenizer_named
from experiments.errors import UserError
from experiments.tasks import LanguageModelling

ROWS = 10_000  # tokenised at a time


@dataclass(frozen=True)
class TextData(TensorData):
    """Token sequences on the CPU.

    train_tokens, test_tokens: uint8, int16 or int32 (N,) in 0..vocabulary-1; length: tokens of a
    sequence; characters: number in the test text, for its loss in bits per character. A text of at
    most ``length`` tokens raises UserError.
    """

    name: str
    train_tokens: Tensor
    test_tokens: Tensor
    vocabulary: int
    length: int
    characters: int

    def __post_init__(self) -> None:
        for split, tokens in (("training", self.train_tokens), ("test", self.test_tokens)):
            if len(tokens) <= self.length:
                raise UserError(
                    f"data.length: {self.length}, but the {split} text has only {len(tokens)} "
                    "tokens"
                )

    def model_arguments(self) -> dict[str, int]:
        return {"vocabulary": self.vocabulary}

    @property
    def task(self) -> LanguageModelling:
        return LanguageModelling(self.characters / len(self.test_tokens))

    def rows(self, train: bool, device: Device) -> Batch:
        tokens = self.train_tokens if train else self.test_tokens
        return windows(tokens.to(device), self.length)

    def batch(self, x: Tensor, y: Tensor, device: Device, random: torch.Generator | None) -> Batch:
        """Return x, and the next token of each as y: int64 (B, L) both."""
        return x.long(), y.long()


def windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return views (n, L) of tokens (N,), N > L, and of the tokens one later; a rest is left out.

    The windows do not overlap, so an epoch predicts every token once.
    """
    n = (len(tokens) - 1) // length
    return tokens[: n * length].view(n, length), tokens[1 : n * length + 1].view(n, length)


def load_hub_text(
    train: Mapping[str, str | None],
    test: Mapping[str, str | None],
    tokenizer: str,
    vocabulary: int,
    length: int,
    column: str = "text",
    root: str | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    cache_dir: str | None = None,
) -> TextData:
    """Text of two splits, tokenised once; the vocabulary comes from the training text alone.

    train, test: name (of the hub's repository, or of its folder in ``root``), config, split, and
    the expected number of rows if it is to be checked.
    tokenizer: "characters" or "bpe". train_limit, eval_limit: use only so many tokens.
    """
    tokens_of = tokenizer_named(tokenizer)
    parts = [
        load_rows(**part, columns=[column], root=root, cache_dir=cache_dir)
        for part in (train, test)
    ]
    names = [f"{part['name']}, split {part['split']!r}" for part in (train, test)]
    asked = {"column": column, "tokenizer": tokenizer}
    counting = f"learning the vocabulary of {names[0]}"
    found = map_cached(parts[0], learn, counting, None, **asked, vocabulary=vocabulary)
    learned = found["learned"][0]
    encoded = [
        map_cached(part, encode, f"tokenising {name}", ROWS, **asked, learned=learned)
        for part, name in zip(parts, names, strict=True)
    ]
    train_tokens, test_tokens = (concatenated(part, "tokens") for part in encoded)
    kept = test_tokens[:eval_limit]
    share = len(kept) / max(len(test_tokens), 1)
    characters = round(sum(encoded[1]["characters"]) * share)
    name, size = ", ".join(dict.fromkeys((train["name"], test["name"]))), tokens_of(learned).size
    return TextData(name, train_tokens[:train_limit], kept, size, length, characters)


def load_topics(tokenizer: str, vocabulary: int, length: int) -> TextData:
    """`pydoc_data.topics`, about 700 thousand characters; the last tenth is the test text.

    The text differs a little between Python versions, and so do scores. It is tokenised at every
    start, which takes a second.
    """
    from pydoc_data import topics

    tokens_of = tokenizer_named(tokenizer)
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    lines = text.splitlines(keepends=True)
    split = len(lines) * 9 // 10
    learned = tokens_of.learn(lines[:split], vocabulary)
    train, test = (
        encode({"text": part}, "text", tokenizer, learned)
        for part in (lines[:split], lines[split:])
    )
    tokens = (torch.from_numpy(part["tokens"][0]) for part in (train, test))
    return TextData("topics", *tokens, tokens_of(learned).size, length, test["characters"][0])


def learn(batch: Mapping[str, Sequence[str]], column: str, tokenizer: str, vocabulary: int) -> dict:
    """Return the vocabulary of a text, in the form that `encode` takes."""
    return {"learned": [TOKENIZERS[tokenizer].learn(batch[column], vocabulary)]}


def encode(batch: Mapping[str, Sequence[str]], column: str, tokenizer: str, learned: str) -> dict:
    """Return the tokens of all rows as one list, and the number of characters they stand for."""
    texts = batch[column]
    tokens = TOKENIZERS[tokenizer](learned).encode(texts)
    count = len(tokens) if tokenizer == "characters" else sum(map(len, texts))
    return {"tokens": [tokens], "characters": [count]}
