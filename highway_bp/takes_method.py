"""`TakesMethod`: what every chain has in common for those who set its method and look at it."""

from __future__ import annotations

from highway_bp.methods import Method, check_method


class TakesMethod:
    """Has a gradient ``method``, which holds from the next forward pass on.

    Attributes:
        length: L, the layers or time steps of the chain.
        iterations: taken by each solution since the last forward pass began.
    """

    length: int
    iterations: list[int]

    @property
    def method(self) -> Method:
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        check_method(method)
        self._check(method)
        self._method = method

    def _check(self, method: Method) -> None:
        """Raise ValueError for a method that this cannot take."""
