"""One call of one layer: what it returned, and what it takes to call it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.caches import without_caches
from highway_bp.shown import Shown, shown_by
from highway_bp.surroundings import Surroundings


@dataclass
class Ran:
    """What the run of one layer has given.

    Attributes:
        out: what the layer returned.
        carry: carry(h_in, h_out) gives its residual path's Jacobian; None: the identity.
        z: what its block returned, where the residual path is cut; then a vector-Jacobian product
            of the local graph is w J, otherwise it is w (J + K).
    """

    out: Any
    carry: Callable[[Tensor, Tensor], object] | None = None
    z: Tensor | None = None


class Layer(Protocol):
    """One layer of a chain.

    Attributes:
        module: the layer itself.
        name: what errors call it.
        key: under which the chain keeps its gamma.
    """

    module: nn.Module
    name: str
    key: str

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> Ran:
        """Call it."""


@dataclass
class Call:
    """One call of a layer, and what it takes to repeat it.

    Attributes:
        args, kwargs: without key-value caches, which hold the graphs of later layers.
        state, version: what it returned, and the version of that.
        shown: tensors inside it whose gradient somebody may look at.
    """

    layer: Layer
    args: tuple
    kwargs: dict
    surroundings: Surroundings
    has_filled_cache: bool
    state: Tensor | None
    version: int | None
    shown: Shown

    def repeat(self, h: Tensor, extras: dict[int, Tensor]) -> Returned:
        """Once more, with new tensors for the extras of earlier layers, by the old ones' ids.

        Raises:
            RuntimeError: it cannot be repeated.
        """
        if self.has_filled_cache:
            raise RuntimeError(
                f"{self.layer.name} has to be run once more for its gradient, but was given a "
                "key-value cache that was not empty; expected use_cache=False, or Backprop()"
            )
        args, kwargs = pytree.tree_map(lambda t: extras.get(id(t), t), (self.args, self.kwargs))
        with self.surroundings.restored(self.layer.name), torch.enable_grad():
            returned = Returned(self.layer.run(h, args, kwargs))
        if self.state._version == self.version and not _agree(returned.state, self.state):
            raise RuntimeError(
                f"{self.layer.name} was run once more for its gradient and returned another state; "
                "expected backward(retain_graph=True), which spares that, or Backprop()"
            )
        return returned


@torch.no_grad()
def _agree(a: Tensor | None, b: Tensor) -> bool:
    """Whether two states differ by no more than the order of sums may make them."""
    if a is None or a.shape != b.shape:
        return False
    bound = torch.finfo(b.dtype).eps ** 0.5 * torch.linalg.vector_norm(b)
    return not torch.linalg.vector_norm(a - b) > bound  # NaN agrees with NaN


def state_of(out: Any) -> Tensor | None:
    """The state among what a layer returned: all of it, or the first of a tuple."""
    first = next(iter(pytree.tree_leaves(out)), None)
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


class Returned:
    """What a layer has returned, taken apart.

    Attributes:
        state: the first tensor; None where it is not floating, or something else comes first.
        extras: the other tensors that want a gradient.
    """

    def __init__(self, ran: Ran):
        self.ran = ran
        self._flat, self._spec = pytree.tree_flatten(ran.out)
        self.state = state_of(ran.out)
        tensors = [t for t in self._flat if isinstance(t, Tensor) and t is not self.state]
        self.extras = list({id(t): t for t in tensors if t.requires_grad}.values())

    def with_outer(self, outer: Sequence[Tensor]) -> Any:
        """The same with other tensors for the state and the extras."""
        known = {id(t): o for t, o in zip([self.state, *self.extras], outer, strict=True)}
        return pytree.tree_unflatten([known.get(id(t), t) for t in self._flat], self._spec)


def run_layer(
    layer: Layer, h: Tensor, args: tuple, kwargs: dict, has_filled_cache: bool = False
) -> tuple[Call, Returned]:
    """Call a layer on h.

    Raises:
        RuntimeError: it changes h in place.
    """
    version, surroundings = h._version, Surroundings(layer.module, h)
    with shown_by(layer.module) as shown:
        returned = Returned(layer.run(h, args, kwargs))
    if h._version != version:
        raise RuntimeError(
            f"{layer.name} changes its input in place; a layer of a chain returns a new tensor"
        )
    args, kwargs = without_caches((args, kwargs))
    state, version = returned.state, getattr(returned.state, "_version", None)
    rest = (has_filled_cache, state, version, shown)
    return Call(layer, args, kwargs, surroundings, *rest), returned
