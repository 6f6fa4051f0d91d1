"""Classifiers of sentence pairs: RoBERTa, BERT and their like, from transformers."""

from collections.abc import Sequence

from torch import Tensor

import highway_bp as hb
from models.halves import RobertaTrunk
from models.pretrained import HoldsHubModel, from_pretrained, quiet_transformers


class PairClassifier(HoldsHubModel):
    """An encoder with a classifier on its first token.

    RoBERTa's chain consists of the halves of its layers, L = 2 x ``layers``, as in the paper. The
    chain of any other encoder consists of its layers.

    Args:
        vocabulary, padding: number of the tokenizer's tokens, and its padding token.
        labels: names of the classes, in the order of their numbers.
        pretrained: name of the hub, folder, or "package:NAME/FOLDER"; None builds a RoBERTa of
            the sizes below, randomly initialised.
        layers, hidden, heads, length: sizes of that RoBERTa.

    Raises:
        ValueError: the tokenizer does not match the model, or the model's labels differ in order.
    """

    def __init__(
        self,
        vocabulary: int,
        padding: int,
        labels: Sequence[str],
        pretrained: str | None = None,
        layers: int = 4,
        hidden: int = 128,
        heads: int = 4,
        length: int = 128,
    ):
        super().__init__()
        transformers = quiet_transformers()
        build = transformers.AutoModelForSequenceClassification
        names = dict(enumerate(labels))
        if pretrained is None:
            model = build.from_config(
                transformers.RobertaConfig(
                    vocab_size=vocabulary,
                    pad_token_id=padding,
                    hidden_size=hidden,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    intermediate_size=4 * hidden,
                    type_vocab_size=2,
                    max_position_embeddings=length + padding + 1,
                    id2label=names,
                    bos_token_id=None,
                    eos_token_id=None,
                )
            )
        else:
            _check_labels(pretrained, labels)
            model = from_pretrained(build, pretrained, id2label=names)
            _check_tokenizer(model.config, pretrained, vocabulary, padding)
        self.has_types = model.config.type_vocab_size > 1
        if isinstance(model, transformers.RobertaForSequenceClassification):
            model.roberta.encoder = RobertaTrunk(model.roberta.encoder)
            self.model = model
        else:
            self.model = hb.convert(model, hb.Backprop())

    def forward(self, x: Tensor) -> Tensor:
        """x int64 (B, 3, L): tokens, attention mask, token types -> logits (B, classes)."""
        tokens, mask, types = x.unbind(1)
        more = {"token_type_ids": types} if self.has_types else {}
        return self.model(input_ids=tokens, attention_mask=mask, **more).logits


def _check_tokenizer(config, pretrained: str, vocabulary: int, padding: int) -> None:
    if vocabulary > config.vocab_size:
        raise ValueError(
            f"pretrained={pretrained!r} knows {config.vocab_size} tokens; expected the tokenizer's "
            f"{vocabulary}: set data.tokenizer to the model's own"
        )
    if config.pad_token_id != padding:
        raise ValueError(
            f"pretrained={pretrained!r} pads with token {config.pad_token_id}; expected the "
            f"tokenizer's {padding}: set data.tokenizer to the model's own"
        )


def _check_labels(pretrained: str, labels: Sequence[str]) -> None:
    """Raise ValueError if a trained classifier has the data's labels in another order."""
    names = from_pretrained(quiet_transformers().AutoConfig, pretrained).id2label
    found = [name.lower() for _, name in sorted(names.items())]
    if set(found) == set(labels) and found != list(labels):
        raise ValueError(
            f"pretrained={pretrained!r} has the labels {found}; expected the data's "
            f"{list(labels)}, in this order"
        )
