"""Tiny data sets, a tokenizer and a RoBERTa in the format in which the hub keeps the real ones."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from models.pretrained import quiet_transformers

LABELS = ["entailment", "neutral", "contradiction"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # tokens 0 to 3, as RoBERTa's
LEXICON = [a + b for a in "bdfgklmnprst" for b in ("a", "et", "in", "oro", "us", "ya")]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_split(folder: Path, split: str, columns: Mapping[str, list], **features: object) -> Path:
    """A split in one parquet file, named as the hub does; features: of columns with a type."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    file = folder / f"{split}-00000-of-00001.parquet"
    datasets.disable_progress_bars()
    rows.to_parquet(file)
    return file


def write_images(
    root: Path, name: str, place: str, columns: tuple, classes: int, rows: Mapping
) -> None:
    """Random images; columns: of the images, and of the labels. rows: of each split."""
    random = np.random.default_rng(0)
    for split, count in rows.items():
        pixels = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        cells = [{"bytes": png(image), "path": None} for image in pixels]
        labels = random.integers(classes, size=count).tolist()
        names = datasets.ClassLabel(names=[f"class {n}" for n in range(classes)])
        write_split(
            root / name / place,
            split,
            dict(zip(columns, (cells, labels), strict=True)),
            **dict(zip(columns, (datasets.Image(), names), strict=True)),
        )


def write_text(root: Path, name: str, config: str, rows: Mapping[str, int]) -> None:
    """Lines of 60 random words, among titles and empty lines; rows: of each split."""
    random = np.random.default_rng(0)
    for split, count in rows.items():
        lines = []
        for _ in range(count // 3):
            lines += [" = Title = \n", f" {' '.join(random.choice(LEXICON, 60))} \n", "\n"]
        write_split(root / name / config, split, {"text": lines})


def write_pairs(root: Path, name: str, config: str, rows: Mapping[str, int]) -> None:
    """Pairs of random words, labels in turn; rows: of each split."""
    random = np.random.default_rng(0)
    for split, count in rows.items():
        premises, hypotheses = (
            [" ".join(random.choice(LEXICON, words)) for _ in range(count)] for words in (12, 6)
        )
        labels = [row % 3 for row in range(count)]
        columns = {"premise": premises, "hypothesis": hypotheses, "label": labels}
        write_split(root / name / config, split, columns, label=datasets.ClassLabel(names=LABELS))


def write_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """A tokenizer of words in the format of transformers; returns its number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    quiet_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(ids)


def write_roberta(folder: Path, layers: int, hidden: int, length: int) -> None:
    """A RoBERTa with random weights and its tokenizer, as in the hub's repository roberta-base."""
    vocabulary = write_tokenizer(folder, LEXICON)
    transformers = quiet_transformers()
    sizes = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden)
    sizes |= dict(num_attention_heads=2, type_vocab_size=1, max_position_embeddings=length + 2)
    config = transformers.RobertaConfig(vocab_size=vocabulary, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
