"""GPT-2, and decoders of Llama's form, as sublayers: attention, feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from highway_bp.trunks.sublayers import Sublayer


class GPT2Attention(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        arguments.pop("encoder_hidden_states", None)
        arguments.pop("encoder_attention_mask", None)
        return self.layer.attn(self.layer.ln_1(h), **arguments)[0]


class GPT2FeedForward(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        return self.layer.mlp(self.layer.ln_2(h))


class LlamaAttention(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        return self.layer.self_attn(hidden_states=self.layer.input_layernorm(h), **arguments)[0]


class LlamaFeedForward(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        return self.layer.mlp(self.layer.post_attention_layernorm(h))


def gpt2(layer: nn.Module, index: int) -> list[nn.Module]:
    """GPT2Block: h + attn(ln_1(h)), then h + mlp(ln_2(h))."""
    return [GPT2Attention(layer, index), GPT2FeedForward(layer, index)]


def llama(layer: nn.Module, index: int) -> list[nn.Module]:
    """LlamaDecoderLayer and its like: RMSNorm before attention and before the gated MLP."""
    return [LlamaAttention(layer, index), LlamaFeedForward(layer, index)]
