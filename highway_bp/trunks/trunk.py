"""`Trunk`: the residual layers of a model that stays as it is, run as one `ResidualChain`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from highway_bp.chain import ResidualChain
from highway_bp.methods import Method
from highway_bp.parallel.ranks import Ranks, shares_of
from highway_bp.parallel.sharded_chain import ShardedChain
from highway_bp.takes_method import TakesMethod
from highway_bp.trunks.pending import Pending
from highway_bp.trunks.sublayers import opaque

Wrap = Callable[[nn.Module, int], list[nn.Module]]


class Trunk(TakesMethod):
    """Layers h -> h that a model's own code calls one after the other.

    While gradients are wanted and the method cuts the chain, the model's loop is handed a `Turn`
    for every layer: it notes the arguments and returns a `Pending` state. The last one runs all
    layers as a chain. Otherwise the loop gets the layers themselves.

    Args:
        containers: the module lists that hold the layers, in order.
        wrap: ``wrap(layer, index)`` gives the chain's layers for one layer; they are called with
            (h, calls), and ``calls[index]`` is what the model gave that layer.
        method: the gradient method; may be set at any time.
    """

    def __init__(self, containers: Sequence[nn.Module], wrap: Wrap, method: Method):
        self._containers, self._wrap = tuple(containers), wrap
        self.by_name = wrap is opaque
        self._wrapped: tuple[nn.Module, ...] = ()  # the layers that the chain was made of
        self._make: Callable[[list[nn.Module]], ResidualChain | ShardedChain] = ResidualChain
        self._chain = ResidualChain([])
        self._calls: list[tuple[tuple, dict]] = []
        self._h: Tensor | None = None  # h_0
        self._pending: Tensor | None = None
        self.method = method
        for container in containers:
            container.__class__ = _handing_out(type(container))
            container.trunk = self

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for c in self._containers for layer in c._modules.values()]

    @property
    def chain(self) -> ResidualChain | ShardedChain:
        """The chain of the layers as they are now."""
        layers = tuple(self.layers)
        if layers != self._wrapped:
            self._wrapped = layers
            self._chain = self._make(
                [part for i, layer in enumerate(layers) for part in self._wrap(layer, i)]
            )
        if self._chain.method is not self._method:
            self._chain.method = self._method
        return self._chain

    def shard(self, group, sizes: Sequence[int] | None, scan: str, micro_batches: int) -> None:
        """Have the layers run by the processes of ``group``, ``sizes`` of them by each."""
        shares = shares_of(len(self.layers), Ranks(group).size, sizes)

        def sharded(parts: list[nn.Module]) -> ShardedChain:
            # the parts of a layer, which holds their parameters together, stay together
            per_layer = len(parts) // len(self._wrapped)
            return ShardedChain(
                parts,
                self._method,
                group,
                [len(s) * per_layer for s in shares],
                scan,
                micro_batches,
            )

        self._make, self._wrapped = sharded, ()

    @property
    def length(self) -> int:
        return self.chain.length

    @property
    def iterations(self) -> list[int]:
        return self._chain.iterations

    @iterations.setter
    def iterations(self, values: list[int]) -> None:
        self._chain.iterations = values

    @property
    def _sharded(self) -> bool:
        return self._make is not ResidualChain

    @property
    def cuts(self) -> bool:
        if self._sharded:  # no process can run all layers itself
            return True
        return torch.is_grad_enabled() and self._method.groups(1) is not None

    def turns(self, container: nn.Module) -> list[Turn]:
        start = 0
        for c in self._containers:
            if c is container:
                break
            start += len(c)
        return [Turn(self, start + i, layer) for i, layer in enumerate(container._modules.values())]

    def take(self, turn: Turn, h: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The call of one layer; the last one returns the chain's result."""
        if turn.index == 0:
            self._calls, self._h, self._pending = [], h, Pending.like(h)
        name = f"layer {turn.index} ({type(turn.layer).__name__})"
        if turn.index != len(self._calls):
            raise RuntimeError(
                f"{name} of the trunk was called after {len(self._calls)} layers; expected every "
                "layer once, in order"
            )
        if turn.index > 0 and h is not self._pending:
            raise RuntimeError(
                f"{name} of the trunk got a state that the layer before did not return; a trunk "
                "hands the state from layer to layer unchanged"
            )
        if turn.layer._forward_pre_hooks:
            raise RuntimeError(f"{name} of the trunk has a forward pre-hook, which would not run")
        if kwargs.get("output_attentions"):
            raise RuntimeError(
                "output_attentions=True while gradients are wanted; expected False: no gradient "
                "leaves the attention weights of a trunk (torch.no_grad() or Backprop() show them)"
            )
        self._calls.append(_without_cache(args, kwargs) if self._sharded else (args, kwargs))
        chain = self.chain
        if len(self._calls) < len(self._wrapped):
            return self._pending
        calls, h = self._calls, self._h
        self._calls, self._h, self._pending = [], None, None
        if not any(layer._forward_hooks for layer in self._wrapped):
            return chain(h, calls)
        states = [h, *chain(h, calls, return_states=True)]
        return self._observed(states, calls)

    def _observed(self, states: list[Tensor], calls: list) -> Tensor:
        """Show the layers' forward hooks what they would have seen (recorded hidden states)."""
        per_layer = (len(states) - 1) // len(self._wrapped)
        ends = states[::per_layer]
        for i, (layer, (args, kwargs)) in enumerate(zip(self._wrapped, calls, strict=True)):
            h, out = ends[i], ends[i + 1]
            for key, hook in list(layer._forward_hooks.items()):
                if key in layer._forward_hooks_with_kwargs:
                    changed = hook(layer, (h, *args), kwargs, out)
                else:
                    changed = hook(layer, (h, *args), out)
                if changed is not None:
                    raise RuntimeError(
                        f"a forward hook of {type(layer).__name__} changes its output, which a "
                        "trunk cannot follow; change a module inside the layer, or use Backprop()"
                    )
        return states[-1]


def _without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Nothing is to be written into by one micro-batch after the other, or by one process alone."""

    def kept(value):
        if not hasattr(value, "get_seq_length"):
            return value
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "a key-value cache in a sharded model, each process of which would "
                "fill a part; expected use_cache=False"
            )
        return None

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}


class Turn:
    """Stands for one layer in the model's loop; in all but being called it is that layer."""

    def __init__(self, trunk: Trunk, index: int, layer: nn.Module):
        self.trunk, self.index, self.layer = trunk, index, layer

    def __getattr__(self, name: str):
        return getattr(self.layer, name)

    @torch.compiler.disable
    def __call__(self, *args, **kwargs) -> Tensor:
        if args:
            h, *args = args
        else:
            h = kwargs.pop(next(iter(inspect.signature(self.layer.forward).parameters)))
        return self.trunk.take(self, h, tuple(args), kwargs)


class _HandsOutTurns:
    trunk: Trunk

    @torch.compiler.disable
    def __iter__(self):
        if self.trunk.cuts:
            return iter(self.trunk.turns(self))
        return iter(self._modules.values())

    def __getitem__(self, index):
        if not isinstance(index, slice):
            # Models of transformers iterate; the loop of one that was named by hand may count.
            counted = self.trunk.by_name and self.trunk.cuts
            return list(self)[index] if counted else super().__getitem__(index)
        chosen = list(self)[index]
        if not self.trunk.cuts:
            return nn.ModuleList(chosen)
        if len(chosen) != len(self):
            raise RuntimeError(
                f"the model uses {len(chosen)} of its trunk's {len(self)} layers; remove the "
                "others, or use Backprop()"
            )
        return chosen


class TrunkList(_HandsOutTurns, nn.ModuleList):
    """An ``nn.ModuleList`` whose layers belong to a `Trunk`."""


class TrunkSequential(_HandsOutTurns, nn.Sequential):
    """An ``nn.Sequential`` whose layers belong to a `Trunk`."""


def _handing_out(cls: type) -> type:
    return {nn.ModuleList: TrunkList, nn.Sequential: TrunkSequential}[cls]
