"""BERT and RoBERTa (post-LN), and ViT (pre-LN), as sublayers: attention, feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from highway_bp.trunks.sublayers import PostLN, Sublayer


class BertAttention(PostLN):
    def inner(self, h, **arguments) -> Tensor:
        attention = self.layer.attention
        arguments.pop("encoder_attention_mask", None)
        z = getattr(attention, "self")(h, **arguments)[0]  # noqa: B009, it is called "self"
        return attention.output.dropout(attention.output.dense(z))

    @property
    def norm(self) -> nn.LayerNorm:
        return self.layer.attention.output.LayerNorm


class BertFeedForward(PostLN):
    def inner(self, h, **arguments) -> Tensor:
        output = self.layer.output
        return output.dropout(output.dense(self.layer.intermediate(h)))

    @property
    def norm(self) -> nn.LayerNorm:
        return self.layer.output.LayerNorm


class ViTAttention(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        z = self.layer.attention(self.layer.layernorm_before(h), **arguments)[0]
        return self.layer.dropout(z)


class ViTFeedForward(Sublayer):
    def inner(self, h, **arguments) -> Tensor:
        return self.layer.dropout(self.layer.mlp(self.layer.layernorm_after(h)))


def bert(layer: nn.Module, index: int) -> list[nn.Module]:
    """BertLayer and its like: LN(h + attention(h)), then LN(h + mlp(h))."""
    return [BertAttention(layer, index), BertFeedForward(layer, index)]


def vit(layer: nn.Module, index: int) -> list[nn.Module]:
    """ViTLayer: h + attention(ln(h)), then h + mlp(ln(h))."""
    return [ViTAttention(layer, index), ViTFeedForward(layer, index)]
