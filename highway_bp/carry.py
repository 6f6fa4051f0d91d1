"""Carries: K_i = dr_i/dx, the Jacobian of a layer's residual path (paper, section 3, Table 1).

Gradients are row vectors, so a carry multiplies from the right: ``K.vecmat(w)`` is w K. A row
vector w times ``A @ B`` (the Jacobian product A B) is first multiplied by A, then by B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Carry:
    """A linear map K on cotangents (row vectors); subclasses define ``vecmat``.

    Products are ``w @ K`` for a cotangent w, and ``A @ B`` for two carries.
    """

    def vecmat(self, w: Tensor) -> Tensor:
        """Return w K, a cotangent of h_in and in its shape, for w, a cotangent of h_out."""
        raise TypeError(f"{type(self).__name__} is a carry without vecmat(w): define it")

    def accumulate_(self, v: Tensor | None, w: Tensor, scale: float = 1.0) -> Tensor:
        """Return v + scale * w K, written into v. None is zero; the result may then be w itself."""
        carried = self.vecmat(w)
        if v is None:
            return carried if scale == 1.0 else carried * scale
        return v.add_(carried, alpha=scale)

    def __matmul__(self, other: Carry) -> Carry:
        return compose(self, other)

    def __rmatmul__(self, w: Tensor) -> Tensor:
        return self.vecmat(w)


class Scalar(Carry):
    """K = s I, for a number or 0-d tensor s."""

    def __init__(self, s: float | Tensor):
        self.s = s

    def vecmat(self, w: Tensor) -> Tensor:
        return w * self.s


class Identity(Carry):
    """K = I: the plain residual connection h + g(h)."""

    def vecmat(self, w: Tensor) -> Tensor:
        return w


class Diagonal(Carry):
    """K = diag(d), for a floating or bool tensor d that broadcasts to the state.

    For a ReLU after the sum, d is the mask h > 0.

        >>> hb.Diagonal(torch.tensor([1.0, 0.0])).vecmat(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """

    def __init__(self, d: Tensor):
        self.d = d

    def vecmat(self, w: Tensor) -> Tensor:
        return w * self.d

    def accumulate_(self, v: Tensor | None, w: Tensor, scale: float = 1.0) -> Tensor:
        if v is None or not v.dtype == w.dtype == self.d.dtype:
            return super().accumulate_(v, w, scale)
        return v.addcmul_(w, self.d, value=scale)  # one pass over memory instead of two


class Permutation(Carry):
    """The Jacobian of h -> h.index_select(dim, index).

    Args:
        index: int64 (n,), a permutation of 0 .. n - 1, where n is the state's size along ``dim``.
        dim: the dimension that is permuted.
    """

    def __init__(self, index: Tensor, dim: int = 1):
        self.inverse = torch.argsort(index)
        self.dim = dim

    def vecmat(self, w: Tensor) -> Tensor:
        return w.index_select(self.dim, self.inverse)


class RecordedMap(Carry):
    """The Jacobian dy/dx of a shortcut that has already run; uses the shortcut's autograd graph."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def vecmat(self, w: Tensor) -> Tensor:
        (wK,) = torch.autograd.grad(self.y, self.x, w, retain_graph=True)
        return wK


class LinearMap(RecordedMap):
    """The Jacobian of any linear ``fn``, such as a strided convolution on the shortcut.

    Args:
        fn: linear map of one tensor; only its vector-Jacobian product is used.
        like: tensor with the shape, dtype and device of fn's input.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], like: Tensor):
        with torch.enable_grad():
            x = like.detach().requires_grad_()
            super().__init__(x, fn(x))


class Product(Carry):
    """K_n ... K_2 K_1, stored as factors. A row vector is multiplied by the first factor first."""

    def __init__(self, factors: Sequence[Carry]):
        self.factors = tuple(factors)

    def vecmat(self, w: Tensor) -> Tensor:
        for K in self.factors:
            w = K.vecmat(w)
        return w


def compose(A: Carry, B: Carry) -> Carry:
    """The Jacobian product A B, in closed form where the two are diagonal."""
    match A, B:
        case (Identity(), _):
            return B
        case (_, Identity()):
            return A
        case (Scalar(), Scalar()):
            return Scalar(A.s * B.s)
        case (Diagonal(), Diagonal()):
            return Diagonal(A.d * B.d)
        case (Diagonal(), Scalar()):
            return Diagonal(A.d * B.s)
        case (Scalar(), Diagonal()):
            return Diagonal(A.s * B.d)
    return Product([*_factors(A), *_factors(B)])


def _factors(K: Carry) -> tuple[Carry, ...]:
    return K.factors if isinstance(K, Product) else (K,)


def as_carry(value: object, h_out: Tensor, name: str) -> Carry:
    """Convert the result of a layer's ``carry(h_in, h_out)`` into a Carry.

    None becomes the identity, a number or 0-d tensor a scalar, any other tensor a diagonal (bool
    or floating, broadcasting to ``h_out``). An object with ``vecmat`` is used as it is.

    Raises:
        TypeError: another type, or a diagonal that is neither bool nor floating.
        ValueError: a diagonal that does not broadcast to the state's shape.
    """
    if value is None:
        return Identity()
    if isinstance(value, Carry):
        return value
    if isinstance(value, Tensor):
        return _diagonal(value, h_out, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Scalar(float(value))
    if callable(getattr(value, "vecmat", None)):
        return _Foreign(value)
    raise TypeError(
        f"carry of {name} is a {type(value).__name__}; expected None, a number, a tensor "
        "(the diagonal) or an object with vecmat(w)"
    )


def _diagonal(d: Tensor, h_out: Tensor, name: str) -> Carry:
    if not (d.dtype == torch.bool or d.is_floating_point()):
        raise TypeError(
            f"carry of {name} has dtype {d.dtype}; expected a floating or bool diagonal"
        )
    if d.ndim == 0:
        return Scalar(d.to(h_out.dtype))
    try:
        fits = torch.broadcast_shapes(d.shape, h_out.shape) == h_out.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"carry of {name} has shape {tuple(d.shape)}; expected a diagonal that broadcasts "
            f"to the state's shape {tuple(h_out.shape)}"
        )
    return Diagonal(d.to(h_out.dtype))


class _Foreign(Carry):
    """A user's object that has ``vecmat`` but is no `Carry`."""

    def __init__(self, operator: object):
        self.vecmat = operator.vecmat  # type: ignore[attr-defined,method-assign]
