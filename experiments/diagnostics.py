"""The gradient's error during training (paper, Figure 6), as records of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import highway_bp as hb
from experiments.errors import UserError


@dataclass(frozen=True)
class Diagnostics:
    """At which moments what is measured.

    Args:
        at: fractions of training, 0 (before the first step) to 1.
        ks: numbers of iterations.
        gamma: where the run's method has no iterations.

    Raises:
        UserError: a fraction outside [0, 1]; ks that are no whole numbers.
    """

    at: Sequence[float]
    ks: Sequence[int]
    gamma: float | str

    def __post_init__(self) -> None:
        for name in ("at", "ks"):
            if not isinstance(getattr(self, name), list):
                raise UserError(f"diagnostics.{name}={getattr(self, name)}; expected a list")
        try:
            hb.Highway(0, self.gamma)
        except (TypeError, ValueError) as error:
            raise UserError(f"diagnostics.{error}") from error
        for at in self.at:
            if type(at) not in (int, float) or not 0 <= at <= 1:
                raise UserError(f"diagnostics.at={list(self.at)}; expected fractions from 0 to 1")
        for k in self.ks:
            if type(k) is not int or k < 0:
                raise UserError(f"diagnostics.ks={list(self.ks)}; expected whole numbers from 0")

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after ``step`` of ``steps``."""
        return step in {round(at * steps) for at in self.at}

    def measure(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.nn.Module], torch.Tensor],
        method: hb.Method,
        mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[dict[str, Any]]:
        """A record per k: cosine, relative error, increment, and those of each layer.

        ``loss`` and ``mean`` are as of `hb.gradient_error`.
        """
        method = method if hasattr(method, "k") else hb.Highway(0, self.gamma)
        return [
            {
                "k": e.k,
                "cosine": e.cosine,
                "relative_error": e.relative_error,
                "increment": e.increment,
                "layers": {n: list(v) for n, v in e.layers.items()},
            }
            for e in hb.gradient_error(model, loss, self.ks, method, mean)
        ]


def flat(errors: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For a writer of plain numbers: {"gradient_error/cosine/k1": 0.8, ...}."""
    names = ("cosine", "relative_error", "increment")
    return {f"gradient_error/{name}/k{e['k']}": e[name] for e in errors for name in names}
