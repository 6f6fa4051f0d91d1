"""`TakesMethod`: what every chain has in common for those who set its method and look at it."""

from __future__ import annotations

from highway_bp.methods import Method, check_method


class TakesMethod:
    """Has a gradient ``method``, which holds from the next forward pass on.

    Attributes:
        length: L, the layers or time steps of the chain.
        iterations: taken by each solution of the last backward pass.
    """

    length: int
    iterations: list[int]

    @property
    def method(self) -> Method:
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self.check(method)
        self._method = method

    def check(self, method: Method) -> None:
        """Raise TypeError for what is no method, ValueError for one that this cannot take."""
        check_method(method)
