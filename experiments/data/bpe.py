"""Byte pairs as tokens: GPT-2 style byte-level BPE trained on the training text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.atomic import write_text

CHUNK = 10_000  # rows at a time


class BytePairs:
    """At most ``size`` tokens, all 256 bytes among them; kept in ``file`` as JSON, read from it."""

    def __init__(self, rows: Sequence[str], size: int, file: Path):
        self._tokenizer = _read(file)
        if self._tokenizer is None:
            self._tokenizer = _train(rows, size)
            write_text(file, self._tokenizer.to_str())
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, rows: Sequence[str]) -> Tensor:
        """int16 (N,), int32 for 32768 tokens and more."""
        dtype = np.int16 if self.vocabulary < 2**15 else np.int32
        parts = [np.empty(0, dtype)]
        for start in range(0, len(rows), CHUNK):
            found = self._tokenizer.encode_batch(list(rows[start : start + CHUNK]))
            parts += [np.array(encoding.ids, dtype) for encoding in found]
        return torch.from_numpy(np.concatenate(parts))

    def decode(self, tokens: Tensor) -> str:
        return self._tokenizer.decode(tokens.tolist())


def _train(rows: Sequence[str], size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(rows, trainer, length=len(rows))
    return tokenizer


def _read(file: Path):
    """The tokenizer of a file, None where there is none or it is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(file.read_text())
    except FileNotFoundError:
        return None
    except Exception:  # of no narrower type where the text is no tokenizer: it is made anew
        return None
