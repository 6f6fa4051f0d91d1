"""`convert`: find the residual trunks of a model and let a gradient method train them."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from highway_bp.methods import Method, check_method
from highway_bp.trunks.converted import convert_layer
from highway_bp.trunks.trunk import Trunk

LISTS = (nn.ModuleList, nn.Sequential)
WITHOUT_FORWARD = {nn.ModuleList, nn.ModuleDict, type(None)}
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def convert(
    model: nn.Module, method: Method, layers: str | Sequence[str] | None = None
) -> nn.Module:
    """Let ``method`` train the residual trunks of ``model``, in place, and return the model.

    A trunk is a list of layers of one class, or of a few classes in turn. Each layer maps a state
    to a state and has a residual connection around it. If the model has stages, the lists of
    layers inside them are the trunks. The model's own code still calls the layers. Each layer gets
    a class derived from its own, which makes every call a step of a chain. Nothing else changes;
    with gradients off, or ``Backprop()``, the layers run as before. `set_method` changes the method
    later, `chains` lists the trunks.

        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        >>> model = hb.convert(model, hb.Highway(k=1))
        >>> model(torch.randn(5, 2, 8)).sum().backward()
        >>> hb.iterations(model)
        1

    Args:
        model: the model, or one that contains it, not yet compiled or wrapped for devices.
        method: the gradient method.
        layers: names the trunk if none is found, or another one is wanted: dotted names of the
            ModuleLists or Sequentials that hold its layers, or the name of the layers' class.

    Raises:
        TypeError: ``model`` is no module, or ``method`` no gradient method.
        ValueError: no trunk is found, ``layers`` names none, a layer has lazy weights, or the model
            is already converted, compiled or wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    check_method(method)
    _check_bare(model)
    found = _outermost(model) if layers is None else _joined(model, _named(model, layers))
    _check_weights(model.get_submodule(name) for name in itertools.chain(*found))
    for names in found:
        trunk = Trunk(", ".join(name or type(model).__name__ for name in names), method)
        for name in names:
            for i, layer in enumerate(model.get_submodule(name)):
                if getattr(layer, "_hb_trunk", None) is None:  # one layer may be listed twice
                    convert_layer(layer, trunk, f"{name}.{i}".lstrip("."))
    return model


def _outermost(model: nn.Module) -> list[list[str]]:
    """The outermost lists of layers, grouped by trunk.

    Stages differ in their sizes and contain lists of layers: those lists are taken instead.
    """
    lists = [n for n, layers in _lists(model) if n and all(map(_could_be_layer, layers))]
    if not lists:  # accept layers with one operation inside, and the model as a list
        lists = [n for n, layers in _lists(model) if all(_could_be_layer(m, 1) for m in layers)]
    if not lists:
        raise ValueError(
            f"found no list of layers in {type(model).__name__}; expected a ModuleList or "
            "Sequential of layers of one class, or of classes that each occur twice or more, with "
            'the residual connection inside each: hb.convert(model, method, layers="...")'
        )
    found: list[list[str]] = []
    stages: list[str] = []
    for names in _joined(model, lists):
        inside = any(_is_inside(names[0], outer) for outer in itertools.chain(*found))
        layers = [layer for name in names for layer in model.get_submodule(name)]
        if inside or len(layers) == 1:
            continue
        if _are_stages(layers) and not any(_is_inside(names[0], outer) for outer in stages):
            stages += names
        else:
            found.append(names)
    return found or [lists[:1]]  # one layer, which may be called several times


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(f"{outer}.")  # "" is the model itself


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists of layers that have a forward pass, the outer ones first.

    The layers of a list are of one class, or of classes that each occur twice or more, as in
    hybrids of attention and state spaces.
    """
    for name, module in model.named_modules():
        if isinstance(module, LISTS) and len(module):
            kinds = Counter(type(layer) for layer in module)
            come_again = len(kinds) == 1 or min(kinds.values()) > 1
            if come_again and WITHOUT_FORWARD.isdisjoint(kinds):
                yield name, module


def _could_be_layer(layer: nn.Module, inside: int = 2) -> bool:
    """Whether ``layer`` is no list and no single operation: it holds ``inside`` modules or more."""
    return not isinstance(layer, LISTS) and len(list(layer.modules())) > inside


def _are_stages(layers: Sequence[nn.Module]) -> bool:
    sizes = [[is_lazy(p) or p.shape for p in layer.parameters()] for layer in layers]
    inside = ((_could_be_layer(m[0]) for _, m in _lists(layer)) for layer in layers)
    return any(size != sizes[0] for size in sizes) and all(map(any, inside))


def _named(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    is_one = isinstance(layers, str | nn.Module) or not isinstance(layers, Iterable)
    names = [layers] if is_one else list(layers)
    if not names:
        raise ValueError(f"layers={layers!r}; expected a name, or a list of names")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers is a {type(layers).__name__}; expected a name, or a list of names")
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in names:
        if isinstance(modules.get(name), LISTS) and len(modules[name]):
            if {type(layer) for layer in modules[name]} & WITHOUT_FORWARD:
                raise ValueError(
                    f"layers={name!r} holds lists of modules, which have no forward pass; expected "
                    "layers: put each layer, with its residual connection, into one module"
                )
            found.append(name)
            continue
        of_class = [n for n, m in _lists(model) if type(m[0]).__name__ == name]
        if not of_class:
            known = [f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in _lists(model)]
            raise ValueError(
                f"layers={name!r} is no list of layers of {type(model).__name__} and no class of "
                f"such layers; expected one of {', '.join(known[:6]) or 'none'}"
            )
        found += of_class
    return found


def _joined(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Join lists of one class of layers into one trunk: those of one parent, or one per stage."""
    trunks: defaultdict[tuple[str, type], list[str]] = defaultdict(list)
    for name in names:
        parent, kind = name.rpartition(".")[0], type(model.get_submodule(name)[0])
        trunks[re.sub(r"\.\d+\b", "", parent), kind].append(name)
    return list(trunks.values())


def _check_weights(lists: Iterable[nn.Module]) -> None:
    for layer in itertools.chain(*lists):
        if any(map(is_lazy, layer.parameters())):
            raise ValueError(
                f"{type(layer).__name__} has lazy weights; expected a model that has run once: "
                "model(batch), then convert"
            )


def _check_bare(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                f"{kind} is compiled; expected the model itself: convert, then compile"
            )
        if kind in WRAPPERS:
            raise ValueError(
                f"the model is wrapped in {kind}; expected the model itself: convert, then wrap"
            )
        if getattr(module, "_hb_trunk", None) is not None:
            raise ValueError(
                f"{type(model).__name__} is already converted; set_method(model, method) changes "
                "the method"
            )
