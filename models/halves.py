"""Transformer layers split into two residual halves, attention and feed-forward, as in the paper:
L = 2 x layers. The inner modules and their names are those of the transformers library."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import highway_bp as hb
from models.pretrained import quiet_transformers


class GPT2Attention(hb.ResidualLayer):
    """h + block(h) with h (B, L, d), K = I (Table 1)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.ln_1, self.attn = layer.ln_1, layer.attn

    def block(self, h: Tensor) -> Tensor:
        return self.attn(self.ln_1(h))[0]


class GPT2FeedForward(hb.ResidualLayer):
    """See `GPT2Attention`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.ln_2, self.mlp = layer.ln_2, layer.mlp

    def block(self, h: Tensor) -> Tensor:
        return self.mlp(self.ln_2(h))


class PostLN(nn.Module, ABC):
    """LN(h + block(h)), K = diag(weight / sigma) of LN (Table 1)."""

    @property
    @abstractmethod
    def end(self) -> nn.Module:
        """The module with the block's last parts, ``dense`` and ``dropout``, and ``LayerNorm``."""

    @abstractmethod
    def begin(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return the block's state before ``end``; mask: as attention takes it."""

    def with_carry(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, hb.Carry]:
        u = self.end.dropout(self.end.dense(self.begin(h, mask))) + h
        return self.end.LayerNorm(u), post_ln_carry(u, self.end.LayerNorm)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.with_carry(h, mask)[0]


class RobertaAttention(PostLN):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention = layer.attention

    @property
    def end(self) -> nn.Module:
        return self.attention.output

    def begin(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return getattr(self.attention, "self")(h, mask)[0]  # noqa: B009, it is called "self"


class RobertaFeedForward(PostLN):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    @property
    def end(self) -> nn.Module:
        return self.output

    def begin(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.intermediate(h)


@torch.no_grad()
def post_ln_carry(u: Tensor, norm: nn.LayerNorm) -> hb.Carry:
    """diag(weight / sigma) of LN(u), u (B, L, d); sigma over the last dimension, in float32."""
    wide = u.float() if u.dtype.itemsize < 4 else u
    inverse_sigma = (wide.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt().to(u.dtype)
    return hb.Diagonal(inverse_sigma) @ hb.Diagonal(norm.weight.detach())


class GPT2Trunk(nn.Module):
    """Replaces a GPT2Model: embeddings, the chain ``h``, the last norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.wte, self.wpe, self.drop = model.wte, model.wpe, model.drop
        self.h = chain_of_halves(self, "h", model.h, GPT2Attention, GPT2FeedForward)
        self.ln_f = model.ln_f

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Tokens int64 (B, L) -> an output of transformers with the last state (B, L, d)."""
        h = self.h(self.drop(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]))
        return _output(self.ln_f(h))


class RobertaTrunk(nn.Module):
    """Replaces a RobertaEncoder: the chain ``layer``."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        layers = encoder.layer
        self.layer = chain_of_halves(self, "layer", layers, RobertaAttention, RobertaFeedForward)

    def forward(self, h: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """State (B, L, d), mask as attention takes it -> an output with the last state."""
        return _output(self.layer(h, attention_mask))


def _output(h: Tensor) -> Any:
    """Wrap the state as the models of transformers around these trunks expect it."""
    return quiet_transformers().modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(h)


def chain_of_halves(
    trunk: nn.Module,
    name: str,
    layers: Iterable[nn.Module],
    first: type[nn.Module],
    second: type[nn.Module],
) -> hb.ResidualChain:
    """Return the chain for ``trunk``'s ``name``; a ``state_dict`` keeps the names of the layers."""
    halves = [half for layer in layers for half in (first(layer), second(layer))]
    in_second = {child for child, _ in halves[1].named_children()}

    def by_layer(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:  # all keys keep their order
            i, dot, rest = key.removeprefix(f"{prefix}{name}.").partition(".")
            value = state.pop(key)
            is_half = key.startswith(f"{prefix}{name}.")
            state[f"{prefix}{name}.{int(i) // 2}{dot}{rest}" if is_half else key] = value

    def by_half(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        start = f"{prefix}{name}."
        for key, value in [(key, state.pop(key)) for key in [*state] if key.startswith(start)]:
            i, dot, rest = key.removeprefix(start).partition(".")
            half = 2 * int(i) + (rest.partition(".")[0] in in_second)
            state[f"{start}{half}{dot}{rest}"] = value

    trunk.register_state_dict_post_hook(by_layer)
    trunk.register_load_state_dict_pre_hook(by_half)
    return hb.ResidualChain(halves)
