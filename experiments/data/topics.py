"""The language reference inside every CPython as text: real prose with no download, for trying."""

import torch

from experiments.data.text import TextData, encode
from experiments.data.tokens import tokenizer_named


def load_topics(tokenizer: str, vocabulary: int, length: int) -> TextData:
    """`pydoc_data.topics`, about 700 thousand characters; the last tenth is the test text.

    The text differs a little between Python versions, and so do scores. It is tokenised at every
    start, which takes a second. Raises UserError as `experiments.data.text.load_hub_text` does.
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
