"""A speed is worth something only where the gradient is right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scripts.sharding.setting import Setting, loss_of
from scripts.sharding.strategies import Strategy, named

TOLERANCE = 1e-3  # float32, sums in another order


def gradient_errors(ways: Mapping[str, Strategy], setting: Setting) -> dict[str, float]:
    """Of every exact strategy, the worst distance from the gradients of one process on all.

    Per parameter it is the largest difference of two entries, over the largest entry; over all
    parameters and processes the worst, the same number on all of them; infinite where there is no
    gradient or no number.
    """
    exact = {name: way for name, way in ways.items() if way.exact}
    expected = reference(setting)
    own = torch.stack([worst(way, expected) for way in exact.values()])
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return dict(zip(exact, own.tolist(), strict=True))


def reference(setting: Setting) -> dict[str, Tensor]:
    """Gradients of all parameters, by plain autograd on the whole batch."""
    layers = setting.build()
    loss_of(nn.Sequential(*layers)(setting.input())).backward()
    return {name: p.grad for name, p in named(layers, range(len(layers))).items()}


def worst(way: Strategy, expected: Mapping[str, Tensor]) -> Tensor:
    """The largest relative difference in this process, after one step."""
    way.zero_grad()
    way.step()
    return torch.stack(
        [_difference(p.grad, expected[name]) for name, p in way.parameters.items()]
    ).max()


def _difference(found: Tensor | None, expected: Tensor) -> Tensor:
    if found is None:
        return torch.tensor(torch.inf)
    return ((found - expected).abs().max() / expected.abs().max()).nan_to_num(nan=torch.inf)
