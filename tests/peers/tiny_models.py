"""Tiny models of transformers' classes, from their own default configurations made small."""

import contextlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from models.pretrained import quiet_transformers

tf = quiet_transformers()
from transformers.models.auto import modeling_auto as auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

LAYERS, TOKENS = 3, 100
LARGEST = 30_000_000  # parameters; a class that stays larger is left out
SIZES = {  # by value, the fields of configurations
    LAYERS: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks depth e_layers d_layers decoder_depth
        encoder_num_layers decoder_num_layers text_num_layers""",
    32: """hidden_size d_model n_embd n_embed dim embed_dim hidden_dim width d_embed embedding_size
        encoder_hidden_size decoder_hidden_size word_embed_proj_dim projection_dim out_hidden_size
        encoder_embed_dim decoder_embed_dim image_size img_size""",
    2: """num_attention_heads n_head n_heads num_heads encoder_attention_heads num_kv_heads
        decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads
        num_key_value_heads num_experts_per_tok num_selected_experts moe_topk moe_k top_k_experts
        spatial_merge_size n_group topk_group attn_layer_period""",
    48: """intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner mlp_dim d_inner
        ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size""",
    16: """head_dim d_kv attention_head_dim attention_head_size v_head_dim q_lora_rank kv_lora_rank
        rotary_dim index_head_dim qk_rope_head_dim qk_nope_head_dim""",
    8: "patch_size attention_window",
    120: "vocab_size text_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions",
    4: "window_size num_experts n_routed_experts num_local_experts moe_num_experts index_topk",
    0: "pad_token_id mask_time_prob mask_feature_prob",
    1: "attn_layer_offset bos_token_id decoder_start_token_id prediction_length",
}
FIELDS = {name: value for value, names in SIZES.items() for name in names.split()}
MAY_BE_NONE = ("n_inner", "d_inner", "head_dim")
LISTS = {  # by field, every number in a list
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes"), 32),
    **dict.fromkeys(("depths", "num_heads", "num_attention_heads", "mlp_ratios"), 2),
}
RANDOM = ("dropout", "drop_rate", "dropout_rate", "dropout_prob", "_pdrop", "drop", "drop_prob")


def tiny_config(kind: str) -> Any:
    """The default configuration of a model type, with small sizes and without dropout."""
    cls = CONFIG_MAPPING[kind]
    small = _small(vars(cls()))
    try:
        config = cls(**small)
    except Exception:  # fields that depend on each other
        config = cls()
    _shrink(config)
    return config


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, old in fields.items():
        is_number = isinstance(old, int | float) and not isinstance(old, bool)
        if name in FIELDS and (is_number or (old is None and name in MAY_BE_NONE)):
            found[name] = FIELDS[name]
        elif name in LISTS and isinstance(old, list | tuple):
            found[name] = [LISTS[name]] * len(old)
        elif is_number and name.endswith(RANDOM):
            found[name] = 0.0
        elif name.endswith("layer_types") and isinstance(old, list):  # every type, if there is room
            found[name] = (list(dict.fromkeys(reversed(old)))[::-1] + [old[-1]] * LAYERS)[:LAYERS]
    return found


def _shrink(config: Any) -> None:
    for name, value in _small(vars(config)).items():
        with contextlib.suppress(Exception):  # a validator of the class
            setattr(config, name, value)
    for inner in vars(config).values():
        if hasattr(inner, "model_type"):
            _shrink(inner)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        rope["mrope_section"] = [2, 3, 3]  # together half of a head
    config._attn_implementation = config._experts_implementation = "eager"


@cache
def model_types() -> dict[str, str]:
    """The model type of each class: with a language or image head, or without a head."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    found = {}
    for kind in sorted(CONFIG_MAPPING):
        for names in (mapping.get(kind, ()) for mapping in mappings):
            found |= dict.fromkeys([names] if isinstance(names, str) else names, kind)
    return found


def names() -> list[str]:
    return list(model_types())


def build(name: str) -> nn.Module:
    """The class's tiny model in float64, in evaluation mode, with weights that matter."""
    cls, config = getattr(tf, name), tiny_config(model_types()[name])
    if cls.config_class is not None and not isinstance(config, cls.config_class):
        config = next(c for c in vars(config).values() if isinstance(c, cls.config_class))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size} parameters; expected at most {LARGEST}")
    torch.manual_seed(0)
    model = cls(config).double().eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, 0, 0.15)
    return model


def batches(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches that may fit the model, by the names of its forward's arguments."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    config, names = model.config, inspect.signature(model.forward).parameters
    tokens = torch.randint(3, TOKENS, (2, 9), generator=generator)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3) or 3
    pixels = {"pixel_values": numbers(2, channels, height, width)}
    decoder = {"decoder_input_ids": tokens.flip(0)} if "decoder_input_ids" in names else {}
    if "input_ids" in names:
        text = {"input_ids": tokens, **decoder}
        yield text
        yield text | pixels
        yield text | {"bbox": torch.zeros(2, 9, 4, dtype=torch.long)}
    elif "pixel_values" in names:
        yield pixels
        yield {"pixel_values": numbers(2, channels, 4 * height, 4 * width)}
        frames = getattr(config, "num_frames", 4) or 4
        yield {"pixel_values": numbers(2, frames, channels, height, width)}
    for shape in ((2, 2000), (2, 1, 2000), (2, 64, 16), (2, 1024, 128)):
        yield {"input_values": numbers(*shape)}
    for shape in ((2, getattr(config, "num_mel_bins", 80), 128), (2, 64, 80), (2, 64, 160)):
        yield {"input_features": numbers(*shape), **decoder}
    yield {"inputs": numbers(2, 8, getattr(config, "d_model", 16))}
    length, inputs = getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1)
    yield {"past_values": numbers(2, length, inputs)}
