"""One call of one layer: its results, and all that is needed to repeat the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from highway_bp.containers import leaves, replaced
from highway_bp.recorded import recorded
from highway_bp.shown import Shown, shown_by
from highway_bp.surroundings import Surroundings, refuse_second_run, version_of


@dataclass
class LayerResult:
    """The results of running one layer.

    Attributes:
        out: what the layer returned.
        carry: carry(h_in, h_out) gives its residual path's Jacobian; None: the identity.
        is_cut: whether the local graph is without the residual path, which is the identity then.
            The graph's vector-Jacobian product is w J with a cut, otherwise w (J + K).
    """

    out: Any
    carry: Callable[[Tensor, Tensor], object] | None = None
    is_cut: bool = False


class Layer(Protocol):
    """One layer of a chain.

    Attributes:
        module: the layer itself.
        name: its name in error messages.
        key: the key under which the chain stores the layer's gamma.
    """

    module: nn.Module
    name: str
    key: str

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> LayerResult:
        """Call the module on the state h."""


def carry_of(layer: Layer) -> Callable[[Tensor, Tensor], object] | None:
    """The layer's carry(h_in, h_out); None without it, or if carry is data or another submodule.

    Raises:
        TypeError: the method takes other arguments.
    """
    carry = getattr(layer.module, "carry", None)
    if not callable(carry):
        return None
    try:
        arguments = signature(carry.forward if isinstance(carry, nn.Module) else carry)
    except ValueError:  # a function without a signature
        return carry
    try:
        arguments.bind("h_in", "h_out")
    except TypeError as error:
        if isinstance(carry, nn.Module):
            return None
        raise TypeError(
            f"{layer.name} has carry{arguments}; expected carry(h_in, h_out), the Jacobian of the "
            "residual path, or another name"
        ) from error
    return carry


@dataclass
class Call:
    """One call of a layer, and all that is needed to repeat the call.

    Attributes:
        given: args and kwargs as they were before the call, without key-value caches, which hold
            the graphs of later layers.
        results: the layer's state and extras, each with its version.
        shared: its input, state and extras with their versions, if any of them share memory.
        changes: whether the layer has changed an argument in place.
        shown: tensors inside the layer whose gradient somebody may look at.
    """

    layer: Layer
    given: tuple[tuple, dict]
    surroundings: Surroundings
    has_filled_cache: bool
    results: list[tuple[Tensor, int]]
    shared: list[tuple[Tensor, int]]
    changes: bool
    shown: Shown

    def check_shared(self) -> None:
        """Raise RuntimeError if tensors that share memory were changed in place since.

        A chain detaches them from each other. So autograd does not know, as it does of views, that
        a change of one is a change of the other.
        """
        if any(t._version != version for t, version in self.shared):
            raise RuntimeError(
                f"{self.layer.name} returned tensors that share memory with each other or with its "
                "input, and one of them was changed in place since; expected copies (clone), or "
                "Backprop()"
            )

    def repeat(self, h: Tensor, extras: dict[int, Tensor]) -> Returned:
        """Call the layer again; ``extras`` holds new extras of earlier layers, by id of the old.

        Raises:
            RuntimeError: the call cannot be repeated, or gives other results.
        """
        name = self.layer.name
        if self.has_filled_cache:
            why = "was given a key-value cache that was not empty"
            refuse_second_run(name, why, "use_cache=False")
        if self.changes:
            refuse_second_run(name, "changes an argument in place")
        args, kwargs = replaced(self.given, extras, copies=True)
        with self.surroundings.restored(name), torch.enable_grad():
            returned, _ = _run(self.layer, h, args, kwargs)
        if any(t._version != version for t, version in self.results):
            refuse_second_run(name, "what it returned was changed in place since")
        if not self._is_result(returned):
            refuse_second_run(name, "gave other results")
        return returned

    def _is_result(self, returned: Returned) -> bool:
        """Whether ``returned`` equals the first call's results."""
        found = [returned.state, *returned.extras]
        return len(found) == len(self.results) and all(
            _agree(f, t) for f, (t, _) in zip(found, self.results, strict=True)
        )


@torch.no_grad()
def _agree(a: Tensor | None, b: Tensor) -> bool:
    """Whether two results differ by no more than rounding in another order of summation."""
    if a is None or a.shape != b.shape:
        return False
    power = 0.75 if b.dtype.itemsize < 4 else 0.5
    bound = torch.finfo(b.dtype).eps ** power * torch.linalg.vector_norm(b)
    return not torch.linalg.vector_norm(a - b) > bound  # NaN agrees with NaN


def state_of(out: Any) -> Tensor | None:
    """The state in a layer's output: its first value if that is a floating tensor, else None."""
    first = next(iter(pytree.tree_leaves(out)), None)
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


class Returned:
    """A layer's output, split into the state and the extras.

    Attributes:
        flat: all values in the layer's output.
        state: the first tensor; None where it is not floating, or something else comes first.
        extras: the other tensors that require a gradient. ``written`` are among them: tensors that
            were put into lists and dictionaries among the arguments, or recorded.
    """

    def __init__(self, result: LayerResult, written: Sequence[Tensor]):
        self.result = result
        self.flat, self._spec = pytree.tree_flatten(result.out)
        self.state = state_of(result.out)
        tensors = [t for t in (*self.flat, *written) if isinstance(t, Tensor)]
        tensors = [t for t in tensors if t is not self.state]
        self.extras = list({id(t): t for t in tensors if t.requires_grad}.values())

    def with_replaced(self, others: dict[int, Tensor]) -> Any:
        """The layer's output; tensors whose ids are in ``others`` are replaced."""
        return pytree.tree_unflatten([others.get(id(t), t) for t in self.flat], self._spec)


def run_layer(
    layer: Layer,
    h: Tensor,
    args: tuple,
    kwargs: dict,
    given: tuple[tuple, dict],
    has_filled_cache: bool = False,
) -> tuple[Call, Returned]:
    """Call a layer on h; ``given`` is what `Call` keeps of the arguments.

    Raises:
        RuntimeError: the layer changes h in place, or an argument that requires a gradient.
    """
    version, surroundings = version_of(h), Surroundings(layer.module, h)
    with shown_by(layer.module) as shown:
        returned, changes = _run(layer, h, args, kwargs)
    if version_of(h) != version:
        raise RuntimeError(
            f"{layer.name} changes its input in place; a layer of a chain returns a new tensor"
        )
    found = [] if returned.state is None else [returned.state, *returned.extras]
    results = [(t, version_of(t)) for t in found]
    shared = [(h, version), *results] if _share_memory([h, *found]) else []
    call = Call(layer, given, surroundings, has_filled_cache, results, shared, changes, shown)
    return call, returned


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    places = [t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided]
    return len(set(places)) < len(places)


def _run(layer: Layer, h: Tensor, args: tuple, kwargs: dict) -> tuple[Returned, bool]:
    """Run a layer. Returns its results, and whether it has changed an argument in place."""
    before = [t for t in _tensors((args, kwargs)) if t is not h]
    lengths = [(v, len(v)) for v in recorded().values()]
    versions = [version_of(t) for t in before]
    ran = layer.run(h, args, kwargs)
    changed = [t for t, v in zip(before, versions, strict=True) if version_of(t) != v]
    if any(t.requires_grad for t in changed):
        raise RuntimeError(
            f"{layer.name} changes an argument in place, whose gradient would be lost; a layer of "
            "a chain returns new tensors"
        )
    known = {id(t) for t in (h, *before)}
    written = _tensors((args, kwargs, [v[n:] for v, n in lengths]))
    written = [t for t in written if t.requires_grad and id(t) not in known]
    return Returned(ran, written), bool(changed)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in leaves(tree) if isinstance(t, Tensor)]
