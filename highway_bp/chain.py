"""`ResidualChain`: residual layers whose backward pass is solved by a gradient method."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from highway_bp.has_method import Chain
from highway_bp.layer_call import LayerResult, carry_of
from highway_bp.methods import Backprop, Method
from highway_bp.step import step


class ResidualChain(Chain, nn.ModuleList):
    """h_i = f_i(h_{i-1}), i = 1..L, with h_0 the input; gradients by ``method`` (paper, Eq. 2-3).

    The forward pass is exact whatever the method. The ``state_dict`` is that of an
    ``nn.Sequential`` of the same layers.

    A layer is any ``nn.Module`` that maps one tensor to one tensor, a `ResidualLayer` or not. It
    may have these methods:

    - ``carry(h_in, h_out)``: its residual path's Jacobian K, as None (identity, the default), a
      number, a tensor (the diagonal) or an object with ``vecmat(w)`` (see ``highway_bp.carry``);
    - ``with_carry(h, *args)``: returns forward(h) and K, for a K that needs values of forward.

        >>> class Layer(nn.Linear):
        ...     def forward(self, h):
        ...         return h + super().forward(h)
        >>> chain = hb.ResidualChain([Layer(4, 4) for _ in range(3)], hb.Highway(k=3))
        >>> h = torch.randn(8, 4, requires_grad=True)
        >>> chain(h).square().sum().backward()  # k = L: the exact gradient
        >>> h.grad.shape
        torch.Size([8, 4])

    Args:
        layers: the layers f_1 .. f_L.
        method: any gradient method, such as ``Highway(k)``; default ``Backprop()``, exact. The
            attribute ``method`` may be set at any time and is used from the next forward pass on.

    Raises:
        TypeError: ``layers`` is no list of modules, or ``method`` is not a gradient method.
    """

    def __init__(self, layers: Iterable[nn.Module], method: Method | None = None):
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers is {type(layers).__name__}; expected a list of modules")
        super().__init__(layers)
        self.set_up(Backprop() if method is None else method)

    @property
    def length(self) -> int:
        return len(self)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ResidualChain(list(self)[index], self.method)
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        return f"method={self.method}"

    def forward(
        self, h: Tensor, *args, return_states: bool = False, **kwargs
    ) -> Tensor | list[Tensor]:
        """Run all layers.

        Args:
            h: the input state h_0, of a floating dtype and any shape.
            *args, **kwargs: passed to every layer; tensors among them get gradients.
            return_states: return [h_1, ..., h_L]; a loss may use each of them.

        Returns:
            h_L, or all states.

        Raises:
            TypeError: ``h`` is not a floating tensor, or a layer returns something else; ``h`` is
                complex or nested, with a method other than ``Backprop()``.
            RuntimeError: a layer uses a tensor that needs a gradient and is neither a parameter
                of the chain nor an argument.
        """
        if not isinstance(h, Tensor) or not (h.is_floating_point() or h.is_complex()):
            what = str(h.dtype) if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"input state is {what}; expected a floating tensor")
        cuts, states = self.cuts(h, args, kwargs), []
        if cuts and (h.is_complex() or h.is_nested):
            raise TypeError("input state is complex or nested; expected another one, or Backprop()")
        for i, layer in enumerate(self):
            h = self._cut(i, layer, h, args, kwargs) if cuts else layer(h, *args, **kwargs)
            if return_states:
                states.append(h)
        return states if return_states else h

    def _cut(self, i: int, layer: nn.Module, h: Tensor, args: tuple, kwargs: dict) -> Tensor:
        named = ChainLayer(layer, i, alone=self.method.group_size == 1)
        return step(self, named, h, args, kwargs, first=i == 0)


@dataclass(frozen=True)
class ChainLayer:
    """The ``index``-th layer of a `ResidualChain`; ``alone``: whether it is a group by itself."""

    module: nn.Module
    index: int
    alone: bool

    @property
    def name(self) -> str:
        return f"layer {self.index} ({self.module._get_name()})"

    @property
    def key(self) -> str:
        return str(self.index)

    def run(self, h: Tensor, args: tuple, kwargs: dict) -> LayerResult:
        layer = self.module
        by_forward = _runs_forward_alone(layer)
        if by_forward and _has_with_carry(layer):
            out, K = layer.with_carry(h, *args, **kwargs)
            return LayerResult(out, lambda h_in, h_out: K)
        carry = carry_of(self)
        is_sum = by_forward and type(layer).forward is ResidualLayer.forward
        if self.alone and is_sum and carry is None:
            z = layer.block(h, *args, **kwargs)
            _check_tensor(z, f"block of {self.name}")
            if not z.requires_grad:  # a constant block: cut, its layer would end the graph
                return LayerResult(h + z)
            return LayerResult(h.detach() + z, is_cut=True)
        out = layer(h, *args, **kwargs)
        _check_tensor(out, self.name)
        return LayerResult(out, carry)


def _check_tensor(out: object, what: str) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{what} returned a {type(out).__name__}; a layer of a ResidualChain maps one "
            "tensor to one tensor: wrap it so that it returns the state alone"
        )


class ResidualLayer(nn.Module):
    """f(h) = h + block(h): a `ResidualChain` differentiates the block alone.

    That gives w J at once; other layers give w (J + K), and w K is subtracted. A subclass defines
    ``block(h, *args)``, a method or a module. If it defines a forward pass or a carry, it is run as
    any other module.

        >>> class Layer(hb.ResidualLayer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = nn.Linear(4, 4)
        >>> chain = hb.ResidualChain([Layer(), Layer()], hb.Highway(k=1))
        >>> chain(torch.randn(8, 4)).sum().backward()
    """

    def forward(self, h: Tensor, *args, **kwargs) -> Tensor:
        return h + self.block(h, *args, **kwargs)


def _runs_forward_alone(layer: nn.Module) -> bool:
    """Whether nothing but its class's forward runs when the layer is called."""
    return (
        type(layer).__call__ is nn.Module.__call__
        and layer._compiled_call_impl is None
        and not _has_any_global_hook()
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in vars(layer)
    )


def _has_with_carry(layer: nn.Module) -> bool:
    """Whether its class has with_carry, and no subclass further down defines another forward."""
    for base in type(layer).__mro__:
        if "with_carry" in vars(base) or "forward" in vars(base):
            return "with_carry" in vars(base)
    return False
