"""Tiny models of transformers and torchvision, one of each family that `hb.convert` knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.pretrained import quiet_transformers

tf = quiet_transformers()
import torchvision  # noqa: E402, after its missing operators are declared

V, H = 13, 8


@dataclass
class Case:
    """A model in float64 and training mode, a batch for it, and where its layers are."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    trunk: tuple[str, ...]

    def loss(self, model: nn.Module) -> torch.Tensor:
        out = model(**self.batch) if "x" not in self.batch else model(self.batch["x"])
        return out.square().mean() if isinstance(out, torch.Tensor) else out.loss

    def logits(self, model: nn.Module) -> torch.Tensor:
        out = model(**self.batch) if "x" not in self.batch else model(self.batch["x"])
        return out if isinstance(out, torch.Tensor) else out.logits


def sizes(layers: int) -> dict:
    return dict(
        vocab_size=V,
        hidden_size=H,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=12,
        bos_token_id=None,
        eos_token_id=None,
    )


def decoder(kind: str, layers: int, **more) -> nn.Module:
    config = getattr(tf, f"{kind}Config")(
        **sizes(layers), num_key_value_heads=1, head_dim=4, pad_token_id=None, **more
    )
    model = getattr(tf, f"{kind}ForCausalLM")(config)
    for module in list(model.modules()):  # their own RMSNorm computes in float32 always
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, nn.RMSNorm(len(child.weight), eps=1e-6))
    return model


def gpt2(layers: int, **more) -> nn.Module:
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | more
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=V,
            n_embd=H,
            n_layer=layers,
            n_head=2,
            n_positions=12,
            bos_token_id=None,
            eos_token_id=None,
            **still,
        )
    )


def encoder(kind: str, layers: int) -> nn.Module:
    config = getattr(tf, f"{kind}Config")(
        **sizes(layers),
        num_labels=3,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(tf, f"{kind}ForSequenceClassification")(config)


def mamba(layers: int) -> nn.Module:
    return tf.MambaForCausalLM(
        tf.MambaConfig(
            vocab_size=V,
            hidden_size=H,
            num_hidden_layers=layers,
            state_size=4,
            time_step_rank=2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            residual_in_fp32=False,
        )
    )


def vit(layers: int) -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=H,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=4,
            patch_size=2,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def resnet(block: str, layers: int) -> nn.Module:
    kind = getattr(torchvision.models.resnet, block)
    stages = {2: [1, 1, 0, 0], 4: [1, 1, 1, 1], 8: [2, 2, 2, 2]}[layers]
    model = torchvision.models.ResNet(kind, [max(n, 1) for n in stages], num_classes=3)
    if 0 in stages:
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128 * kind.expansion, 3)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(2, V, (2, 4))


def text_batch(labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    x = tokens()
    mask = torch.ones_like(x)
    mask[1, -1] = 0  # padding
    return {"input_ids": x, "attention_mask": mask, "labels": x if labels is None else labels}


def images() -> dict[str, torch.Tensor]:
    """Four of them: over two values, batch normalisation would leave signs, and no gradient."""
    return {"x": torch.randn(4, 3, 4, 4)}


CLASSES = torch.tensor([0, 2])
MAKERS = {
    "gpt2": (lambda n: gpt2(n), text_batch, ("transformer.h",)),
    "llama": (lambda n: decoder("Llama", n), text_batch, ("model.layers",)),
    "mistral": (lambda n: decoder("Mistral", n), text_batch, ("model.layers",)),
    "qwen2": (
        lambda n: decoder(
            "Qwen2", n, use_sliding_window=True, sliding_window=2, max_window_layers=1
        ),
        text_batch,
        ("model.layers",),
    ),
    "qwen3": (lambda n: decoder("Qwen3", n), text_batch, ("model.layers",)),
    "bert": (lambda n: encoder("Bert", n), lambda: text_batch(CLASSES), ("bert.encoder.layer",)),
    "roberta": (
        lambda n: encoder("Roberta", n),
        lambda: text_batch(CLASSES),
        ("roberta.encoder.layer",),
    ),
    "vit": (
        lambda n: vit(n),
        lambda: {"pixel_values": torch.randn(2, 3, 4, 4), "labels": CLASSES},
        ("vit.layers", "vit.encoder.layer"),
    ),
    "mamba": (
        lambda n: mamba(n),
        lambda: {"input_ids": (x := tokens()), "labels": x},
        ("backbone.layers",),
    ),
    "resnet-basic": (lambda n: resnet("BasicBlock", n), images, ()),
    "resnet-bottleneck": (lambda n: resnet("Bottleneck", n), images, ()),
}
TRANSFORMERS = [name for name in MAKERS if not name.startswith(("resnet", "mamba"))]


def build(name: str, layers: int = 2) -> Case:
    """The same numbers at every call; blocks large enough that every path matters."""
    make, batch, trunk = MAKERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = make(layers).double().train()
        for p in model.parameters():
            if p.dim() == 1:
                torch.nn.init.normal_(p, p.mean().item(), 0.3)
            elif p.dim() == 2:
                torch.nn.init.normal_(p, 0, 0.4)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    return Case(model, inputs, trunk)
