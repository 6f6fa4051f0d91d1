"""The language reference inside every CPython as text: real prose with no download, for trying."""

from pathlib import Path

from experiments.data.cache import default_cache_dir
from experiments.data.text import TextData, tokenised


def load_topics(
    tokenizer: str, vocabulary: int, length: int, cache_dir: str | None = None
) -> TextData:
    """`pydoc_data.topics`, about 700 thousand characters; the last tenth is the test text.

    It differs a little between Python versions, and so do scores. Raises UserError as
    `experiments.data.text.load_hub_text` does.
    """
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    lines = text.splitlines(keepends=True)
    split = len(lines) * 9 // 10
    place = Path(cache_dir) if cache_dir else default_cache_dir()
    return tokenised(
        "topics",
        lambda: [lines[:split], lines[split:]],
        [Path(topics.__file__)],
        {},
        place,
        tokenizer,
        vocabulary,
        length,
        None,
        None,
    )
