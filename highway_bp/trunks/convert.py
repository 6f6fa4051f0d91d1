"""`convert`: find the residual trunk of a model and let a gradient method train it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from highway_bp.methods import Method, check_method
from highway_bp.trunks import decoders, encoders, resnets
from highway_bp.trunks.sublayers import opaque
from highway_bp.trunks.trunk import Trunk, TrunkList, TrunkSequential, Wrap


@dataclass(frozen=True)
class Family:
    """Layers that are split the same way.

    needs: attributes a layer must have, so that a class of the same name but of another make is
    not mistaken; joined: neighbouring module lists (a ResNet's stages) are one trunk.
    """

    classes: tuple[str, ...]
    needs: tuple[str, ...]
    wrap: Wrap
    joined: bool = False

    def holds(self, layer: nn.Module) -> bool:
        names = {cls.__name__ for cls in type(layer).__mro__}
        return bool(names & set(self.classes)) and all(hasattr(layer, n) for n in self.needs)


FAMILIES = (
    Family(("GPT2Block",), ("ln_1", "attn", "ln_2", "mlp"), decoders.gpt2),
    Family(
        ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
        ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        decoders.llama,
    ),
    Family(
        ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"),
        ("attention", "intermediate", "output"),
        encoders.bert,
    ),
    Family(("MambaBlock",), ("norm", "mixer"), opaque),
    Family(
        ("ViTLayer",),
        ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout"),
        encoders.vit,
    ),
    Family(
        ("BasicBlock", "Bottleneck"),
        ("conv1", "bn1", "relu", "conv2", "bn2", "downsample"),
        resnets.torchvision_block,
        joined=True,
    ),
)


def convert(model: nn.Module, method: Method, layers: str | None = None) -> nn.Module:
    """Let ``method`` train the residual trunk of ``model``, in place, and return the model.

    Known: GPT-2, Llama, Mistral, Qwen2 and 3, BERT, RoBERTa, ViT of transformers (each layer two
    sublayers of the chain: attention, feed-forward), its Mamba, and torchvision's ResNets.
    Parameters, ``state_dict``, class and forward pass of the model stay what they are; with
    gradients off, or ``Backprop()``, its own layers run as before. `set_method` changes the
    method later.

    Args:
        model: the model, or one that contains it; not compiled nor wrapped for several devices
            yet.
        method: the gradient method.
        layers: for models that are not known: dotted name of the ModuleList or Sequential whose
            layers map a state to a state, each with a residual connection around it. A layer's
            carry is the identity unless it has a ``carry(h_in, h_out)``.

    Raises:
        TypeError: no module, no gradient method, or ``layers`` names something else.
        ValueError: no trunk is found, the model is already converted, compiled or wrapped, or has
            cross-attention.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    check_method(method)
    _check_bare(model)
    if layers is not None:
        Trunk([_named(model, layers)], opaque, method)
        return model
    found = list(_trunks(model))
    if not found:
        raise ValueError(_unknown(model))
    for containers, family in found:
        for layer in containers[0]:
            if hasattr(layer, "crossattention"):
                raise ValueError(
                    f"{type(layer).__name__} has cross-attention; expected a decoder or an encoder "
                    "of its own"
                )
        Trunk(containers, family.wrap, method)
    return model


def _trunks(model: nn.Module) -> Iterator[tuple[list[nn.Module], Family]]:
    """Module lists whose layers are all of one family; stages of one parent together."""
    for parent in model.modules():
        joined: list[nn.Module] = []
        family_joined = None
        for child in parent.children():
            family = _family(child)
            if family is None:
                continue
            if family.joined:
                joined.append(child)
                family_joined = family
            else:
                yield [child], family
        if family_joined is not None:
            yield joined, family_joined


def _family(container: nn.Module) -> Family | None:
    if type(container) not in (nn.ModuleList, nn.Sequential) or not len(container):
        return None
    return next((f for f in FAMILIES if all(f.holds(layer) for layer in container)), None)


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        container = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"layers={name!r}; {type(model).__name__} has no such module{_candidates(model)}"
        ) from None
    if type(container) not in (nn.ModuleList, nn.Sequential):
        raise TypeError(
            f"layers={name!r} is a {type(container).__name__}; expected a ModuleList or Sequential"
        )
    if not len(container):
        raise ValueError(f"layers={name!r} is empty; expected at least one layer")
    return container


def _check_bare(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                f"{kind} is compiled; expected the model itself: convert, then compile"
            )
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"the model is wrapped in {kind}; expected the model itself: convert, then wrap"
            )
        if isinstance(module, TrunkList | TrunkSequential):
            raise ValueError(
                f"{type(model).__name__} is already converted; set_method(model, method) changes "
                "the method"
            )


def _unknown(model: nn.Module) -> str:
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    return (
        f"found no residual trunk in {type(model).__name__}; known layers: {known}. Name them by "
        f'hand: hb.convert(model, method, layers="...")' + _candidates(model)
    )


def _candidates(model: nn.Module) -> str:
    """Lists of at least two layers of one class, as a hint."""
    found = []
    for name, module in model.named_modules():
        if name and type(module) in (nn.ModuleList, nn.Sequential) and len(module) > 1:
            (kind, count), *others = Counter(type(m).__name__ for m in module).most_common()
            if not others:
                found.append(f"{name} ({count} x {kind})")
    return f"; candidates: {', '.join(found[:4])}" if found else ""
