"""Gradient methods: ways of solving w_{i-1} = b_{i-1} + w_i (J_i + K_i) (paper, Eq. 3, Thm. 2).

A method sees a `LinearSystem` and nothing else: no models, no time steps, no devices.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol, runtime_checkable

from highway_bp.auto_gamma import AutoGamma
from highway_bp.check import check_share, check_whole

Gamma = float | list[float]  # one for all layers, or one for each
States = Any  # w_0 .. w_L: a list of tensors, or one stacked tensor, as the system keeps them


class LinearSystem(Protocol):
    """The frozen backward pass of a chain: states 0..L, blocks and carries 1..L between them.

    gamma moves this share of the carry into the block: J + gamma K and (1 - gamma) K.
    """

    length: int  # L

    def cotangents(self) -> States:
        """b_0 .. b_L; the solver may write into all but the last, which is w_L."""

    def own_cotangents(self) -> States:
        """Cotangents of losses on the states themselves; what losses inside the group after a state
        send to it is left out. Methods compute w_0 anew."""

    def through_blocks(self, w: States, gamma: Gamma, states: range) -> States:
        """b_i + w_{i+1} (J_{i+1} + gamma K_{i+1}) for i in ``states``, w_i elsewhere.

        May write into w.
        """

    def scan(self, v: States, gamma: Gamma, states: range) -> States:
        """u_i = v_i + (1 - gamma) u_{i+1} K_{i+1} for i in ``states``, v_i elsewhere.

        May write into v.
        """

    def snapshot(self, w: States) -> States:
        """Return what `relative_change` needs of w; w itself may be overwritten later."""

    def relative_change(self, w: States, old: States) -> float:
        """||w - w_old|| / ||w|| over all states, or over a sample of them."""

    def smallest_blocks(self, auto: AutoGamma) -> Gamma:
        """Return each layer's gamma with the smallest block; called only to estimate gamma."""


@runtime_checkable
class Method(Protocol):
    """A gradient method: a way of solving the linear system of a chain (paper, Eq. 3).

    Attributes:
        group_size: number of consecutive layers that count as one layer, a group; gradients inside
            a group are exact. None: autograd does the backward pass (a `ShardedChain` calls
            ``solve`` all the same).
    """

    group_size: int | None

    def solve(self, system: LinearSystem) -> States:
        """Return w_0 .. w_L."""


@dataclass(frozen=True)
class Backprop:
    """Exact backpropagation: by autograd itself or, in a `ShardedChain`, by substitution."""

    group_size: ClassVar[None] = None

    def solve(self, system: LinearSystem) -> States:
        w = system.cotangents()
        for i in reversed(range(system.length)):
            w = system.through_blocks(w, gamma=1.0, states=range(i, i + 1))
        return w


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point iteration w <- b + w J' with J' the whole layer (Wang & Ragni 2021; K = 0).

    Args:
        k: number of iterations, k >= 0. With one loss at the end, only the last k + 1 layers get a
            gradient.
        group_size: number of consecutive layers that count as one, exact inside.

    Raises:
        TypeError, ValueError: k or group_size is not a whole number in its range.
    """

    k: int
    group_size: int = 1

    def __post_init__(self) -> None:
        check_whole("k", self.k, least=0)
        check_whole("group_size", self.group_size, least=1)

    def solve(self, system: LinearSystem) -> States:
        return Highway(self.k, gamma=1.0).solve(system)


@dataclass(frozen=True)
class Highway:
    """Highway-BP: w <- CumSumProd(b + w J, K), k times (paper, Theorem 2).

    The gradient is the sum over all paths that go through at most k blocks.

    Args:
        k: number of iterations, k >= 0; exact for k >= L, the number of layers (or groups).
        gamma: share of the carry that counts as part of the block, from 0 (the paper's split) to 1
            (fixed point). With "auto" or an `AutoGamma`, every layer gets the gamma that is
            estimated to leave the smallest block.
        group_size: number of consecutive layers that count as one, exact inside.
        tolerance: stop before k iterations, once an iteration changes the gradients of the states
            by less than this share of their norm. None: never stop early.

    Raises:
        TypeError, ValueError: an argument is not a number in its range.
    """

    k: int
    gamma: float | str | AutoGamma = 0.0
    group_size: int = 1
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_whole("k", self.k, least=0)
        check_whole("group_size", self.group_size, least=1)
        if self.tolerance is not None:
            check_share("tolerance", self.tolerance)
        if self.gamma == "auto" or isinstance(self.gamma, AutoGamma):
            return
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, Real):
            raise TypeError(f"gamma={self.gamma!r}; expected a number from 0 to 1, or 'auto'")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; expected a number from 0 to 1, or 'auto'")

    def solve(self, system: LinearSystem) -> States:
        """Return w^k. The paper adds w^0 = CumSumProd(b, K) to every u = CumSumProd(w J, K). The
        scan is linear, so here b is added before the scan: w^{k+1} = CumSumProd(b + w^k J, K).
        `reference.highway` is the formula as printed."""
        gamma = self.gamma
        if not isinstance(gamma, Real):
            gamma = system.smallest_blocks(AutoGamma() if gamma == "auto" else gamma)

        L = system.length
        w = system.scan(system.cotangents(), gamma, range(L))  # w^0
        for m in range(min(self.k, L)):
            states = range(L - m)  # the later states are exact already
            old = None if self.tolerance is None else system.snapshot(w)
            b_plus_wJ = system.through_blocks(w, gamma, states)
            w = system.scan(b_plus_wJ, gamma, states)
            if old is not None and system.relative_change(w, old) < self.tolerance:
                break
        return w


@dataclass(frozen=True)
class TruncatedBPTT:
    """Truncated backpropagation: exact inside windows, no gradient from one window to another.

    Args:
        window: number of consecutive layers (time steps) in a window, at least 1.

    Raises:
        TypeError, ValueError: window is not a whole number of at least 1.
    """

    window: int

    def __post_init__(self) -> None:
        check_whole("window", self.window, least=1)

    @property
    def group_size(self) -> int:
        return self.window

    def solve(self, system: LinearSystem) -> States:
        w = system.own_cotangents()
        return system.through_blocks(w, gamma=1.0, states=range(1)) if system.length else w


def check_fixed_gamma(method: object) -> None:
    """Raise ValueError if the method's gamma is to be estimated, not a number."""
    gamma = getattr(method, "gamma", 0.0)
    if not isinstance(gamma, Real):
        raise ValueError(f"gamma={gamma!r} in a recurrent layer; expected a number from 0 to 1")


def check_method(method: object) -> None:
    """Raise TypeError unless ``method`` is an instance of a gradient method."""
    if not isinstance(method, Method) or isinstance(method, type):
        raise TypeError(
            f"method={method!r}; expected a gradient method such as Backprop(), "
            "FixedPoint(k) or Highway(k)"
        )
