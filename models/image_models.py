"""Image models of other libraries: torchvision's ResNets and transformers' ViT."""

from torch import Tensor, nn

import highway_bp as hb
from models.pretrained import HoldsHubModel, from_pretrained, quiet_transformers

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def torchvision_resnet(classes: int, name: str) -> nn.Module:
    """Return a randomly initialised ResNet of torchvision. Its residual blocks are the chain; the
    projections on its shortcuts are linear carries.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RESNETS:
        raise ValueError(f"name={name!r}; expected one of {', '.join(RESNETS)}")
    from torchvision import models

    return hb.convert(getattr(models, name)(num_classes=classes), hb.Backprop())


class VisionTransformer(HoldsHubModel):
    """A ViT on small images; its ``layers`` layers are the chain.

    Args:
        classes: outputs.
        image_size, patch_size: in pixels.
        pretrained: folder, hub name or "package:NAME/FOLDER"; all sizes are then the model's.
        layers, hidden, heads, dropout: sizes; the feed-forward is four times as wide.

    Raises:
        ValueError: patches that do not tile the image, or heads that do not divide the width.
    """

    def __init__(
        self,
        classes: int,
        image_size: int = 32,
        patch_size: int = 4,
        pretrained: str | None = None,
        layers: int = 12,
        hidden: int = 192,
        heads: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size}; expected a divisor of {image_size}")
        if hidden % heads:
            raise ValueError(f"heads={heads}; expected a divisor of hidden={hidden}")
        transformers = quiet_transformers()
        if pretrained is None:
            model = transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    image_size=image_size,
                    patch_size=patch_size,
                    num_labels=classes,
                    num_hidden_layers=layers,
                    hidden_size=hidden,
                    num_attention_heads=heads,
                    intermediate_size=4 * hidden,
                    hidden_dropout_prob=dropout,
                    attention_probs_dropout_prob=dropout,
                )
            )
        else:
            model = from_pretrained(
                transformers.AutoModelForImageClassification,
                pretrained,
                num_labels=classes,
                ignore_mismatched_sizes=True,
            )
        self.model = hb.convert(model, hb.Backprop())

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, image_size, image_size) -> logits (B, classes)."""
        return self.model(pixel_values=x).logits
