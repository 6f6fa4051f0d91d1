"""Tokenizers that learn from the training text: its frequent characters, or byte pairs."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from experiments.errors import UserError

CODE_POINTS = 0x110000


class Characters:
    """The characters of ``learned`` are tokens 0, 1, ...; all others are left out of a text."""

    @staticmethod
    def learn(texts: Sequence[str], size: int) -> str:
        """The ``size`` most frequent characters, ties by code point."""
        counts = Counter()
        for text in texts:
            counts.update(text)
        return "".join(sorted(counts, key=lambda c: (-counts[c], c))[:size])

    def __init__(self, learned: str) -> None:
        self.size = len(learned)
        self._token = np.full(CODE_POINTS, -1, np.int16)
        self._token[_code_points(learned)] = np.arange(self.size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """uint8 (N,), int16 if there are more than 256 characters."""
        tokens = self._token[_code_points("".join(texts))]
        return tokens[tokens >= 0].astype(np.uint8 if self.size <= 256 else np.int16)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


class BytePairs:
    """GPT-2's byte-level BPE; ``learned`` is a tokenizer of `tokenizers` as JSON."""

    @staticmethod
    def learn(texts: Sequence[str], size: int) -> str:
        """Learn at most ``size`` tokens, which include all 256 bytes."""
        if size < 256:
            raise UserError(f"data.vocabulary={size}; expected at least 256, one for each byte")
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, size, min_frequency=0, show_progress=False)
        return tokenizer.to_str()

    def __init__(self, learned: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(learned)
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """int16 (N,), int32 for 32768 tokens and more."""
        dtype = np.int16 if self.size < 2**15 else np.int32
        found = self._tokenizer.encode_batch_fast(list(texts))
        return np.concatenate([np.array(text.ids, dtype) for text in found])


TOKENIZERS = {"characters": Characters, "bpe": BytePairs}


def tokenizer_named(name: str) -> type[Characters] | type[BytePairs]:
    """Return the tokenizer class of this name; raise UserError if it is unknown."""
    if name not in TOKENIZERS:
        raise UserError(f"data.tokenizer: {name!r}; give one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]
