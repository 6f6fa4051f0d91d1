"""Labelled sentence pairs: one dataclass, its batches, and the loader of hub data sets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.data import source
from experiments.data.batches import generator_for
from experiments.data.cache import Tensors, cache_key, cached, default_cache_dir
from experiments.data.split import Split
from experiments.errors import UserError
from experiments.tasks import Classification

FORMAT = 1  # raise it when the tensors below change: old cache files are then left alone
LABELS = ("entailment", "neutral", "contradiction")  # 0, 1, 2 in MNLI and SNLI

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairData:
    """Tokenised pairs on the CPU.

    train, test: tokens and token types int32 (N, 2, L), rows filled up with ``padding``;
    train_labels, test_labels: int64 (N,) in the order of LABELS; vocabulary: tokens.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    vocabulary: int
    padding: int

    def model_arguments(self) -> dict[str, object]:
        return {"vocabulary": self.vocabulary, "padding": self.padding, "labels": list(LABELS)}

    @property
    def task(self) -> Classification:
        return Classification()

    def train_batches(self, batch_size: int, seed: int, device: torch.device | str) -> PairBatches:
        return PairBatches(self, batch_size, seed, device)

    def eval_batches(
        self, batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test pairs, shortest first: x int64 (B, 3, L), y int64 (B,)."""
        order = (self.test[:, 0] != self.padding).sum(1).argsort(stable=True)
        for rows in order.split(batch_size):
            x = model_input(self.test[rows], self.padding)
            yield x.to(device), self.test_labels[rows].to(device)


class PairBatches:
    """Shuffled training batches: batch t is a pure function of (seed, t).

    Raises UserError if `batch_size` does not fit the data.
    """

    def __init__(
        self, data: PairData, batch_size: int, seed: int, device: torch.device | str
    ) -> None:
        total = len(data.train_labels)
        if not 1 <= batch_size <= total:
            raise UserError(f"batch_size: {batch_size}; give 1 up to {total}, the training pairs")
        self.steps_per_epoch = total // batch_size
        self._data, self._batch_size, self._seed, self._device = data, batch_size, seed, device
        self._epoch, self._order = -1, torch.empty(0)  # the permutation last used

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x int64 (B, 3, L), L the longest of the batch, and y int64 (B,), of step >= 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = generator_for("epoch", self._seed, epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self._data.train_labels), generator=generator)
        start = position * self._batch_size
        rows = self._order[start : start + self._batch_size]
        x = model_input(self._data.train[rows], self._data.padding)
        return x.to(self._device), self._data.train_labels[rows].to(self._device)


def model_input(pairs: Tensor, padding: int) -> Tensor:
    """(B, 2, L') tokens and types -> int64 (B, 3, L): tokens, mask, types; common padding cut."""
    mask = pairs[:, 0] != padding
    longest = int(mask.sum(1).max())
    x = torch.stack([pairs[:, 0], mask.int(), pairs[:, 1]], 1)
    return x[..., :longest].long()


def load_hub_pairs(
    train: Mapping[str, str | None],
    test: Mapping[str, str | None],
    tokenizer: str,
    length: int,
    root: str | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    cache_dir: str | None = None,
) -> PairData:
    """Pairs of two splits with columns premise, hypothesis, label, tokenised once.

    train, test: name (of the hub's repository, or of its folder in ``root``), config and split.
    tokenizer: of transformers: name of the hub, folder, or "package:NAME/FOLDER". Pairs without
    a label (-1) are left out, tokens beyond ``length`` cut.

    Raises UserError for a missing or damaged file, a tokenizer that cannot be had, labels whose
    names have another order, and when there is neither a local copy nor a network.
    """
    tokens = _tokenizer(tokenizer)
    parts = [Split(root, **part) for part in (train, test)]
    content = hashlib.blake2b(tokens.backend_tokenizer.to_str().encode(), digest_size=8)
    settings = {
        "parts": [dict(train), dict(test)],
        "format": FORMAT,
        "length": length,
        "tokenizer": content.hexdigest(),
    }
    files = [file for part in parts for file in part.files]
    name = ", ".join(dict.fromkeys(part["name"] for part in (train, test)))
    stem = name.replace("/", "--").replace(", ", "+")

    def build() -> Tensors:
        log.info("tokenising %s once; the tokens are kept for the next run", name)
        found = {}
        for kind, part in zip(("train", "test"), parts, strict=True):
            found[kind], found[f"{kind}_labels"] = _encoded(part, tokens, length, kind)
        return found

    place = Path(cache_dir) if cache_dir else default_cache_dir()
    found = cached(place / f"{stem}-pairs-{cache_key(files, settings)}.pt", build)
    return PairData(
        name,
        found["train"][:train_limit],
        found["train_labels"][:train_limit],
        found["test"][:eval_limit],
        found["test_labels"][:eval_limit],
        len(tokens),
        tokens.pad_token_id,
    )


def _tokenizer(name: str):
    from models.pretrained import pretrained_path, quiet_transformers

    try:
        place = pretrained_path(name)
        if not Path(place).is_dir():
            source.offline_unless_reachable()
        return quiet_transformers().AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer: {name!r} is not at hand ({str(error).splitlines()[0][:120]}); give "
            "the folder of a tokenizer, or a name of the hub when there is a network"
        ) from error


def _encoded(part: Split, tokenizer, length: int, kind: str) -> tuple[Tensor, Tensor]:
    (premises, hypotheses, labels), features = part.columns("premise", "hypothesis", "label")
    _check_names(getattr(features["label"], "names", None), kind)
    kept = [i for i, label in enumerate(labels) if label >= 0]
    encoded = tokenizer(
        [premises[i] for i in kept],
        [hypotheses[i] for i in kept],
        truncation=True,
        max_length=length,
        padding="max_length",
        return_token_type_ids=True,
        return_tensors="pt",
    )
    pairs = torch.stack([encoded["input_ids"], encoded["token_type_ids"]], 1).int()
    return pairs, torch.tensor([labels[i] for i in kept])


def _check_names(names: Sequence[str] | None, kind: str) -> None:
    if names is not None and tuple(names) != LABELS:
        raise UserError(
            f"data.{kind}: its labels are {list(names)}; expected {list(LABELS)}, in this order"
        )
