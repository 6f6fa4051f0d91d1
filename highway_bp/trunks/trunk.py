"""`Trunk`: residual layers of a model as one chain, still called by the model's own code."""

import uuid
import weakref
from collections.abc import Iterator

from torch import Tensor, nn

from highway_bp.has_method import Chain
from highway_bp.layer_call import Layer, Returned
from highway_bp.methods import Method
from highway_bp.surroundings import parameters_of
from highway_bp.trunks.carries import has_residual_path


class Trunk(Chain):
    """The chain of layers that are spread over a model.

    The trunk has weak references to its layers, and each layer refers to its trunk. So a copy of a
    model has a trunk of the copied layers.

    Args:
        name: names in the model of the lists that hold the layers.
        method: the gradient method; may be set at any time.
    """

    def __init__(self, name: str, method: Method):
        self.name = name
        self._origin = uuid.uuid4().hex  # a copy has the same
        self._layers: dict[str, weakref.ref] = {}  # by name in the model
        self._calls = 0  # number of calls of all its layers
        self._is_residual: dict[str, bool] = {}  # by name, as seen at the layer's first call
        self._last: str | None = None  # name of the layer called last; None if it is in no chain
        self.set_up(method)

    def add(self, name: str, layer: nn.Module) -> bool:
        """Add a layer, in place of another of its name. Returns whether it is new."""
        known = self._layers.get(name)
        is_new = known is None or known() is not layer
        if is_new:
            self._layers[name] = weakref.ref(layer)
        return is_new

    def has_earlier_layers(self, layer: Layer) -> bool:
        return self._steps_from_last(layer) > 0

    def _steps_from_last(self, layer: Layer) -> int:
        """Steps from the last layer, if in a chain, to this one in the same list; else 0."""
        if self._last is None:
            return 0
        (parent, _, number), (other, _, last) = (
            key.rpartition(".") for key in (layer.key, self._last)
        )
        return int(number) - int(last) if parent == other and number.isdigit() else 0

    def warn_of_break(self, layer: Layer) -> None:
        """Warn if a layer is not given the state that the previous layer of its list returned."""
        if self._steps_from_last(layer) == 1:
            self.warn_once(
                "break",
                f"{layer.name} is not given the state that {self._last} returned: a new chain "
                "begins there",
            )

    def warn_of_copy(self, layer: Layer, other: Chain) -> None:
        """Warn where a layer was copied alone after `convert`: its chain was copied with it."""
        is_copy = isinstance(other, Trunk) and other._origin == self._origin
        if is_copy and len(self.layers) == 1:
            self.warn_once(
                "break",
                f"{layer.name} is a copy of a converted layer and has a chain of its own: a new "
                "chain begins there; expected layers that were copied before hb.convert",
            )

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for ref in self._layers.values() if (layer := ref()) is not None]

    @property
    def length(self) -> int:
        return self.longest or len(self.layers) - self._left_out

    @property
    def _left_out(self) -> int:
        return sum(not is_residual for is_residual in self._is_residual.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter({id(p): p for layer in self.layers for p in parameters_of(layer)}.values())

    def leaves_out(self, layer: Layer) -> bool:
        return self._is_residual.get(layer.key) is False

    def accepts(self, layer: Layer, h: Tensor, returned: Returned) -> bool:
        """Whether the layer joins a chain: it has a residual path, and its state needs a gradient.

        Notes the call.
        """
        state, key, carried = returned.state, layer.key, returned.result.carry is not None
        if key not in self._is_residual:
            self._is_residual[key] = state is not None and (
                carried or (h.shape == state.shape and has_residual_path(h, state))
            )
        self._calls += 1
        self._warn_without_chain()
        is_residual = state is not None and self._is_residual[key] and h.shape == state.shape
        takes = state is not None and state.requires_grad and (carried or is_residual)
        self._last = key if takes else None
        return takes

    def _warn_without_chain(self) -> None:
        """Warn if the method has no effect. Some layers may never be called."""
        seen, residual = len(self._is_residual), sum(self._is_residual.values())
        often = self._calls > 2 * len(self.layers)
        if not residual and (often or seen == len(self.layers)):
            self.warn_once(
                "residual",
                f"no layer of {self.name} that was called has a residual path from the state that "
                "it is given to the first tensor that it returns: they run as before, outside any "
                "chain",
            )
        if residual > 1 and often and self.longest == 1:
            self.warn_once(
                "single",
                f"no chain of {self.name} has more than one layer: the gradient is that of "
                "backpropagation, whatever k",
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_layers": {}}  # copied layers add themselves

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in self.layers))
        left_out = self._left_out
        without = f", {left_out} of them without a residual path" if left_out else ""
        return f"Trunk({self.name}: {len(self.layers)} x {kinds}{without}, method={self.method})"
