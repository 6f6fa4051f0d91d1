"""Text for language models: one dataclass, and its loaders."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.data.bpe import BytePairs
from experiments.data.cache import Tensors, cache_key, cached, default_cache_dir
from experiments.data.characters import Characters
from experiments.data.split import Split
from experiments.data.text_batches import TextBatches, windows
from experiments.errors import UserError
from experiments.tasks import LanguageModelling

FORMAT = 1  # raise it when the tokens below change: old cache files are then left alone
TOKENIZERS = {"characters": Characters, "bpe": BytePairs}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextData:
    """Token sequences on the CPU.

    train_tokens, test_tokens: uint8 or int16 (N,) in 0..vocabulary-1; length: of a training
    sequence; characters: of the test text, that its loss can be told in bits per character.
    """

    name: str
    train_tokens: Tensor
    test_tokens: Tensor
    vocabulary: int
    length: int
    characters: int

    def model_arguments(self) -> dict[str, int]:
        return {"vocabulary": self.vocabulary}

    @property
    def task(self) -> LanguageModelling:
        return LanguageModelling(self.characters / len(self.test_tokens))

    def train_batches(self, batch_size: int, seed: int, device: torch.device | str) -> TextBatches:
        return TextBatches(self.train_tokens, self.length, batch_size, seed, device)

    def eval_batches(
        self, batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test text in order, in windows of ``length``: x, y int64 (B, L); a rest is left."""
        x, y = windows(self.test_tokens.to(device), self.length)
        for rows_x, rows_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
            yield rows_x.long(), rows_y.long()


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

    train, test: name (of the hub's repository, or of its folder in ``root``), config and split.
    tokenizer: "characters" or "bpe". train_limit, eval_limit: use only so many tokens.

    Raises UserError for a missing or damaged file, a missing column, an unknown tokenizer, a text
    shorter than one sequence, and when there is neither a local copy nor a network.
    """
    name = train["name"] if train["name"] == test["name"] else f"{train['name']}, {test['name']}"
    parts = [Split(root, **part) for part in (train, test)]
    files = [file for part in parts for file in part.files]
    settings = {"parts": [dict(train), dict(test)], "column": column}
    place = Path(cache_dir) if cache_dir else default_cache_dir()

    def texts() -> list[list[str]]:
        return [part.columns(column)[0][0] for part in parts]

    return tokenised(
        name, texts, files, settings, place, tokenizer, vocabulary, length, train_limit, eval_limit
    )


def tokenised(
    name: str,
    texts: Callable[[], Sequence[list[str]]],
    files: Sequence[Path],
    settings: Mapping[str, object],
    place: Path,
    tokenizer: str,
    vocabulary: int,
    length: int,
    train_limit: int | None,
    eval_limit: int | None,
) -> TextData:
    """Training and test rows, which ``texts`` gives, as tokens kept in the folder ``place``."""
    if tokenizer not in TOKENIZERS:
        raise UserError(f"data.tokenizer: {tokenizer!r}; give one of {', '.join(TOKENIZERS)}")
    for key, value in (("vocabulary", vocabulary), ("length", length)):
        if type(value) is not int or value < 1:
            raise UserError(f"data.{key}: {value!r}; give a whole number, at least 1")
    key = cache_key(
        files, {**settings, "format": FORMAT, "tokenizer": tokenizer, "vocabulary": vocabulary}
    )
    stem = f"{name.replace('/', '--').replace(', ', '+')}-{tokenizer}-{key}"

    def build() -> Tensors:
        log.info("tokenising %s once; the tokens are kept for the next run", name)
        train, test = texts()
        tokens = TOKENIZERS[tokenizer](train, vocabulary, place / f"{stem}.json")
        counts = torch.tensor([tokens.vocabulary, sum(map(len, test))])
        return {"train": tokens.encode(train), "test": tokens.encode(test), "counts": counts}

    found = cached(place / f"{stem}.pt", build)
    size, characters = found["counts"].tolist()
    train, test = found["train"][:train_limit], found["test"][:eval_limit]
    characters = round(characters * len(test) / max(len(found["test"]), 1))
    if tokenizer == "characters":
        characters = len(test)  # those of the vocabulary
    for split, tokens in (("training", train), ("test", test)):
        if len(tokens) <= length:
            raise UserError(
                f"data.length: {length}, but the {split} text has only {len(tokens)} tokens"
            )
    return TextData(name, train, test, size, length, characters)
