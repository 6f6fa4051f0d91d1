"""The gradient's error during training (paper, Figure 6), as records of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import highway_bp as hb


@dataclass(frozen=True)
class Diagnostics:
    """When the gradient's error is measured, and for which k.

    Args:
        at: fractions of training, 0 (before the first step) to 1.
        ks: numbers of iterations.
        gamma: of Highway-BP, which is measured if the run's method has no k.
    """

    at: Sequence[float]
    ks: Sequence[int]
    gamma: float | str

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
        """Return a record per k: cosine, relative error, increment; the first two also per layer.

        ``loss`` and ``mean`` are passed to `hb.gradient_error`.
        """
        method = method if hasattr(method, "k") else hb.Highway(0, self.gamma)
        errors = hb.gradient_error(model, loss, self.ks, method, mean)
        return [{n: v for n, v in asdict(e).items() if n != "parameters"} for e in errors]


def flat(errors: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the errors as plain numbers for a writer: {"gradient_error/cosine/k1": 0.8, ...}."""
    names = ("cosine", "relative_error", "increment")
    return {f"gradient_error/{name}/k{e['k']}": e[name] for e in errors for name in names}
