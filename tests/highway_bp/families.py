"""Tiny models of transformers and torchvision in float64, and losses on all that they return."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.pretrained import quiet_transformers

tf = quiet_transformers()
import torchvision  # noqa: E402, after its missing operators are declared

Loss = Callable[[nn.Module], Tensor]
LAYERS, V, H = 3, 64, 16
SIZES = dict(hidden_size=H, intermediate_size=32, num_attention_heads=2, num_hidden_layers=LAYERS)
EAGER = dict(attn_implementation="eager")  # returns attention weights
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
IMAGE = SIZES | dict(image_size=16, patch_size=8) | EAGER
DECODING = dict(decoder_start_token_id=0, pad_token_id=0)


def causal(name: str, **more: Any) -> nn.Module:
    sizes = {"vocab_size": V, "num_key_value_heads": 2, **SIZES, **EAGER, **more}
    config = getattr(tf, f"{name}Config")(**sizes)
    return getattr(tf, f"{name.removesuffix('Text')}ForCausalLM")(config)


def experts(name: str, **more: Any) -> nn.Module:
    return causal(name, num_experts_per_tok=2, experts_implementation="eager", **more)


def masked(name: str, **more: Any) -> nn.Module:
    config = getattr(tf, f"{name}Config")(**{"vocab_size": V, **SIZES, **STILL, **EAGER, **more})
    return getattr(tf, f"{name}ForMaskedLM")(config)


def image_classifier(name: str) -> nn.Module:
    return getattr(tf, f"{name}ForImageClassification")(
        getattr(tf, f"{name}Config")(**IMAGE, **STILL)
    )


def gpt2(layers: int = LAYERS, dropout: float = 0.0) -> nn.Module:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = dict(n_embd=H, n_head=2, n_positions=32, n_layer=layers, vocab_size=V)
    ends = dict(bos_token_id=None, eos_token_id=None)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **drops, **ends, **EAGER))


def gptj() -> nn.Module:
    sizes = dict(n_embd=H, n_head=2, n_layer=LAYERS, n_positions=16, rotary_dim=4, vocab_size=V)
    drops = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return tf.GPTJForCausalLM(tf.GPTJConfig(**sizes, **drops, **EAGER))


def seq2seq_sizes() -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        **{f"{side}_layers": LAYERS for side in sides},
        **{f"{side}_attention_heads": 2 for side in sides},
        **{f"{side}_ffn_dim": 32 for side in sides},
        **DECODING,
        **EAGER,
        "d_model": H,
        "vocab_size": V,
    }


def whisper() -> nn.Module:
    tokens = dict(bos_token_id=1, eos_token_id=2, suppress_tokens=None)
    lengths = dict(num_mel_bins=8, max_source_positions=10, max_target_positions=16)
    config = tf.WhisperConfig(
        **seq2seq_sizes(), **tokens, **lengths, begin_suppress_tokens=None, dropout=0.0
    )
    return tf.WhisperForConditionalGeneration(config)


def wav2vec2(stable: bool) -> nn.Module:
    """stable: the variant with norms in front, whose convolutions are a list of one class."""
    names = ("hidden", "attention", "activation", "feat_proj", "final")
    drops = {f"{name}_dropout": 0.0 for name in names} | dict(layerdrop=0.0, mask_time_prob=0.0)
    convolutions = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3))
    norms = dict(feat_extract_norm="layer", do_stable_layer_norm=True) if stable else {}
    positions = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return tf.Wav2Vec2ForSequenceClassification(
        tf.Wav2Vec2Config(
            vocab_size=32, **SIZES, **drops, **convolutions, **positions, **norms, **EAGER
        )
    )


def clip() -> nn.Module:
    text = SIZES | dict(vocab_size=V, bos_token_id=1, eos_token_id=V - 1, pad_token_id=0)
    vision = SIZES | dict(image_size=16, patch_size=8)
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, **EAGER)
    return tf.CLIPModel(config)


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 8, LAYERS, 2, H, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros
    return model


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5, stochastic_depth_prob=0.0
    )


MASKED_LM = {
    "bert": lambda **sizes: masked("Bert", **sizes),
    "roberta": lambda: masked("Roberta", max_position_embeddings=32),
    "electra": lambda: masked("Electra", embedding_size=H),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(
            **dict(vocab_size=V, dim=H, hidden_dim=32, n_layers=LAYERS, n_heads=2),
            **dict(dropout=0.0, attention_dropout=0.0),
            **EAGER,
        )
    ),
    "albert": lambda: masked("Albert", embedding_size=8),
    "modernbert": lambda: masked("ModernBert", pad_token_id=0, cls_token_id=1, sep_token_id=2),
    "deberta": lambda: masked("Deberta"),
    "deberta v2": lambda: masked("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
}
EXPERTS = {
    "mixtral": lambda: experts("Mixtral", num_local_experts=4),
    "qwen2 moe": lambda: experts(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "gpt-oss": lambda: experts("GptOss", head_dim=8, num_local_experts=4),
    "olmoe": lambda: experts("Olmoe", num_experts=4),
}
ALIKE = {  # their names here and in transformers
    **{"mistral": "Mistral", "qwen2": "Qwen2", "phi": "Phi", "gpt-neox": "GPTNeoX"},
    **{"bloom": "Bloom", "falcon": "Falcon", "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3"},
    **{"cohere": "Cohere", "stablelm": "StableLm", "starcoder2": "Starcoder2"},
    "granite": "Granite",
}
OF_WIDE_HEADS = {"qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3Text"}
CAUSAL_LM = {
    **{name: partial(causal, theirs) for name, theirs in ALIKE.items()},
    **{name: partial(causal, theirs, head_dim=8) for name, theirs in OF_WIDE_HEADS.items()},
    "gpt2": gpt2,
    "llama": lambda **sizes: causal("Llama", **sizes),
    "phi3": lambda: causal("Phi3", pad_token_id=0),
    "gpt-j": gptj,
    "opt": lambda: causal("OPT", ffn_dim=32, word_embed_proj_dim=H, dropout=0.0),
    "mpt": lambda: tf.MptForCausalLM(
        tf.MptConfig(d_model=H, n_heads=2, n_layers=LAYERS, vocab_size=V, max_seq_len=16)
    ),
    "mamba": lambda: causal("Mamba", state_size=4),
    "falcon mamba": lambda: causal("FalconMamba", state_size=4),
} | EXPERTS
SEQ2SEQ_LM = {
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**seq2seq_sizes(), dropout=0.0, max_position_embeddings=16)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            **dict(vocab_size=V, d_model=H, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=2),
            **dict(dropout_rate=0.0, decoder_start_token_id=0, **EAGER),
        )
    ),
}
VISION = {
    "vit": lambda: image_classifier("ViT"),
    "deit": lambda: image_classifier("DeiT"),
    "dinov2": lambda: image_classifier("Dinov2"),
    "beit": lambda: image_classifier("Beit"),
    "clip vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE)),
    "siglip vision": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**IMAGE)),
}
OTHERS = {
    "clip": clip,
    "whisper": whisper,
    "wav2vec2": lambda: wav2vec2(stable=False),
    "wav2vec2 stable": lambda: wav2vec2(stable=True),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=5),
    "torchvision vit": torchvision_vit,
    "torchvision swin": swin,
}
MAKERS = CAUSAL_LM | MASKED_LM | SEQ2SEQ_LM | VISION | OTHERS
LENGTHS = {  # of the chains, where they are not [LAYERS]
    **{name: [LAYERS, LAYERS] for name in ("bart", "t5", "clip", "whisper")},
    "wav2vec2 stable": [0, LAYERS],  # its convolutions look like layers until they are called
    "torchvision resnet18": [8],
    "torchvision resnet50": [16],
    "torchvision swin": [2],  # of four layers: the stages are apart
}
# Their attention weights, or router logits, go through float32 whatever the model's dtype.
EXACT_ATTENTION = {
    *("gpt2", "falcon", "bart", "dinov2", "whisper", "wav2vec2", "wav2vec2 stable"),
    *(name for name in MASKED_LM if name != "modernbert"),
}


def build(name: str, **settings: Any) -> nn.Module:
    """The same weights at every call, large enough that every path matters; in evaluation mode.

    settings: of a GPT-2, its ``layers`` and ``dropout``; of llama and bert, more of the config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[name](**settings).double().eval()
        for p in model.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.3)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(2, V, (2, 6), generator=generator)
    pixels = numbers(4, 3, 16, 16)
    if name.startswith("torchvision"):
        return {"x": pixels}
    special = {
        "clip": {"input_ids": tokens, "pixel_values": pixels[:2], "return_loss": True},
        "whisper": {"input_features": numbers(2, 8, 20), "labels": tokens},
        "wav2vec2": {"input_values": numbers(2, 400)},
        "wav2vec2 stable": {"input_values": numbers(2, 400)},
        **{model: {"pixel_values": pixels} for model in VISION},
        **{model: {"input_ids": tokens, "labels": tokens[:, :5].flip(0)} for model in SEQ2SEQ_LM},
    }
    return special.get(name, {"input_ids": tokens, "labels": tokens})


def losses(name: str) -> dict[str, Loss]:
    """By what they are on: "logits", "padded", "hooks", "hidden states", "attention", "router"."""
    given = inputs(name)
    found: dict[str, Loss] = {
        "logits": lambda model: main_loss(call(model, given)),
        "hooks": lambda model: hook_loss(model, given),
    }
    if "input_ids" in given and not name.startswith(("clip", "mamba", "falcon mamba")):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        found["padded"] = lambda model: main_loss(call(model, {**given, "attention_mask": mask}))
    if name == "clip" or name.startswith("torchvision"):
        return found
    found["hidden states"] = lambda model: extra_loss(model, given, "hidden_states")
    if "mamba" not in name:
        found["attention"] = lambda model: extra_loss(model, given, "attentions")
    if name in EXPERTS:
        found["router"] = lambda model: main_loss(
            call(model, given | {"output_router_logits": True})
        )
    return found


def call(model: nn.Module, given: dict[str, Any]) -> Any:
    return model(**given) if "x" not in given else model(given["x"])


def main_loss(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out.sin().sum()
    if getattr(out, "loss", None) is not None:
        return out.loss
    return (out.logits if "logits" in out else out.last_hidden_state).sin().sum()


def hook_loss(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """With what hooks show of all normalisations, most of which are inside layers."""
    shown: list[Tensor] = []
    named = [m for m in model.modules() if re.search("Norm(2d)?$", type(m).__name__)]
    norms = [m for m in named if not list(m.children())]  # not "...EncoderStableLayerNorm"
    handles = [m.register_forward_hook(lambda *call: shown.append(call[2])) for m in norms]
    loss = main_loss(call(model, given))
    for handle in handles:
        handle.remove()
    return loss + sum((i + 1) * t.square().sum() for i, t in enumerate(shown))


def extra_loss(model: nn.Module, given: dict[str, Any], what: str) -> Tensor:
    """With everything of that kind that the model returns."""
    asked = {"hidden_states": "output_hidden_states", "attentions": "output_attentions"}[what]
    out = call(model, {**given, asked: True})
    shown = [t for key in out if key.endswith(what) and out[key] for t in out[key]]
    assert len(shown) >= LAYERS
    return main_loss(out) + sum((i + 1) * t.square().sum() for i, t in enumerate(shown))
