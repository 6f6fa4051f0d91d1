"""The protocol of schedules, and the checks that they share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from highway_bp.check import check_whole
from highway_bp.diagnostics.gradient_error import GradientError
from highway_bp.methods import Backprop, Method

K = int | str  # iterations, or "bp": exact
# ``measure(method, ks)``: the gradient's errors at the coming step, as `hb.gradient_error` gives.
Measure = Callable[[Method, Sequence[int]], list[GradientError]]


@runtime_checkable
class Schedule(Protocol):
    """Gives the gradient method of every step of training."""

    def method_for(self, step: int, steps: int, measure: Measure | None = None) -> Method:
        """The method of one step, 0 <= step < steps; a schedule may call ``measure`` first."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned."""


def with_k(method: Method, k: K) -> Method:
    """``method`` with k iterations; "bp" stands for backpropagation."""
    return Backprop() if k == "bp" else replace(method, k=k)


def check_list(name: str, values: object) -> None:
    """Raise TypeError unless ``values`` is a list or tuple."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}={values!r}; expected a list")


def check_k(k: object) -> None:
    """Raise TypeError or ValueError unless k is a number of iterations or "bp"."""
    if isinstance(k, str):
        if k != "bp":
            raise ValueError(f"ks: {k!r}; expected numbers of iterations, or 'bp'")
        return
    check_whole("ks", k, least=0)


def check_iterates(method: object) -> None:
    """Raise ValueError for a method without k: its schedule would change nothing."""
    if not hasattr(method, "k"):
        raise ValueError(f"method={method}; expected one with iterations, such as Highway(k)")
