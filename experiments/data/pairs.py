"""Labelled sentence pairs, and their loader for data sets in the hub's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from experiments.data.batches import Batch, Device, TensorData
from experiments.data.source import concatenated, load_rows, map_cached, offline_unless_reachable
from experiments.errors import UserError
from experiments.tasks import Classification

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("entailment", "neutral", "contradiction")  # 0, 1, 2 in MNLI and SNLI


@dataclass(frozen=True)
class PairData(TensorData):
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

    task: ClassVar[Classification] = Classification()

    def model_arguments(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "padding": self.padding, "labels": list(LABELS)}

    def rows(self, train: bool, device: Device) -> Batch:
        """Return pairs on the CPU, where their lengths are read; test pairs sorted by length."""
        if train:
            return self.train, self.train_labels
        order = (self.test[:, 0] != self.padding).sum(1).argsort(stable=True)
        return self.test[order], self.test_labels[order]

    def batch(self, x: Tensor, y: Tensor, device: Device, random: torch.Generator | None) -> Batch:
        """x int64 (B, 3, L), L the batch's greatest length, see `model_input`; y int64 (B,)."""
        x = model_input(x, self.padding)
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


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

    train, test: name (of the hub's repository, or of its folder in ``root``), config, split, and
    the expected number of rows if it is to be checked.
    tokenizer: one of transformers: hub name, folder, or "package:NAME/FOLDER". Pairs without
    a label (-1) are left out, and tokens beyond ``length`` are cut.
    """
    tokens = _tokenizer(tokenizer)
    columns = ("premise", "hypothesis", "label")
    name, parts = ", ".join(dict.fromkeys((train["name"], test["name"]))), []
    for part, limit in ((train, train_limit), (test, eval_limit)):
        rows = load_rows(**part, columns=columns, root=root, cache_dir=cache_dir)
        pairs, labels = _tokenised(rows, part["name"], tokens, length)
        parts += [pairs[:limit], labels[:limit]]
    return PairData(name, *parts, len(tokens), tokens.pad_token_id)


def _tokenizer(name: str) -> Any:
    from models.pretrained import pretrained_path, quiet_transformers

    try:
        place = pretrained_path(name)
        if not Path(place).is_dir():
            offline_unless_reachable()
        tokens = quiet_transformers().AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer: {name!r} is not at hand ({str(error).splitlines()[0][:120]}); give "
            "the folder of a tokenizer, or a name of the hub when there is a network"
        ) from error
    if tokens.pad_token_id is None:
        raise UserError(f"data.tokenizer: {name!r} has no padding token; expected one that has")
    return tokens


def _tokenised(rows: Dataset, name: str, tokens: Any, length: int) -> tuple[Tensor, Tensor]:
    """Pairs int32 (N, 2, L) and labels int64 (N,), without the pairs that have no label."""
    names = getattr(rows.features["label"], "names", LABELS)
    if tuple(names) != LABELS:
        raise UserError(f"data: its labels are {names}; expected {list(LABELS)}, in this order")
    backend = tokens.backend_tokenizer
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokens.pad_token_id, pad_token=tokens.pad_token)
    doing = f"tokenising {name}, {len(rows)} pairs"
    found = map_cached(rows, _encoded, doing, tokenizer=backend.to_str())
    labels = rows["label"][:]
    if unknown := set(labels) - {-1, *range(len(LABELS))}:
        raise UserError(f"data: {name} has labels {sorted(unknown)[:3]}; expected -1, 0, 1 or 2")
    labels = torch.tensor(labels, dtype=torch.int64)
    if not (labels >= 0).any():
        raise UserError(f"data: {name}, split {str(rows.split)!r} has no labels; expected another")
    return concatenated(found, "pairs").view(-1, 2, length)[labels >= 0], labels[labels >= 0]


def _encoded(batch: Mapping[str, Sequence[str]], tokenizer: str) -> dict[str, np.ndarray]:
    from tokenizers import Tokenizer

    texts = list(zip(batch["premise"], batch["hypothesis"], strict=True))
    found = Tokenizer.from_str(tokenizer).encode_batch_fast(texts)
    pairs = np.array([[pair.ids, pair.type_ids] for pair in found], np.int32)  # (B, 2, L)
    return {"pairs": pairs.reshape(len(pairs), -1)}
