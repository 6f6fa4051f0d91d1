"""GPT-2 and Llama from the transformers library, as language models on our own vocabulary."""

from torch import Tensor, nn

import highway_bp as hb
from models.halves import GPT2Trunk
from models.pretrained import HoldsHubModel, quiet_transformers

FAMILIES = ("gpt2", "llama")


class Decoder(HoldsHubModel):
    """A causal language model.

    GPT-2's chain consists of the halves of its layers, L = 2 x ``layers``, as in the paper.
    Llama's chain consists of its layers.

    Args:
        vocabulary: number of tokens.
        family: "gpt2" (pre-LN, learnt positions) or "llama" (RMSNorm, rotary positions, gated
            feed-forward of 8/3 the width).
        layers, hidden, heads: sizes; embedding and classifier share their weight.
        length: the longest sequence.
        dropout: of embeddings, attention and sublayers (GPT-2 only).

    Raises:
        ValueError: an unknown family, heads that do not divide the width, or dropout with Llama.
    """

    def __init__(
        self,
        vocabulary: int,
        family: str = "gpt2",
        layers: int = 12,
        hidden: int = 256,
        heads: int = 4,
        length: int = 256,
        dropout: float = 0.0,
    ):
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f"family={family!r}; expected one of {', '.join(FAMILIES)}")
        if hidden % heads:
            raise ValueError(f"heads={heads}; expected a divisor of hidden={hidden}")
        build = _gpt2 if family == "gpt2" else _llama
        self.model = build(vocabulary, layers, hidden, heads, length, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens int64 (B, L) -> logits of the next ones (B, L, V)."""
        return self.model(input_ids=x, use_cache=False).logits


def _gpt2(vocabulary, layers, hidden, heads, length, dropout) -> nn.Module:
    transformers = quiet_transformers()
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.transformer = GPT2Trunk(model.transformer)
    return model


def _llama(vocabulary, layers, hidden, heads, length, dropout) -> nn.Module:
    if dropout:
        raise ValueError(f"dropout={dropout}; expected 0 for Llama, which has none")
    transformers = quiet_transformers()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=length,
            hidden_size=hidden,
            intermediate_size=-(-8 * hidden // 3 // 32) * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    return hb.convert(model, hb.Backprop())
