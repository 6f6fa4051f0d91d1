"""Learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence


def step_schedule(
    step: int, total: int, lr: float, drops: Sequence[float], warmup_steps: int, warmup_lr: float
) -> float:
    """lr, divided by 10 at each fraction in ``drops`` of ``total`` steps, after a flat warm-up.

    The warm-up takes ``warmup_steps``, but no more than 5 % of a shorter training.
    """
    if step < min(warmup_steps, total // 20):
        return warmup_lr
    return lr * 0.1 ** sum(step >= fraction * total for fraction in drops)
