"""`trainer_callback`: a schedule of methods in the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from highway_bp.diagnostics.gradient_error import GradientError, gradient_error
from highway_bp.methods import Method
from highway_bp.schedules.schedule import Schedule
from highway_bp.set_method import set_method

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(
    schedule: Schedule, loss_fn: Callable[[nn.Module], Tensor] | None = None
) -> TrainerCallback:
    """Set the method of every step of a transformers ``Trainer``, and log its k ("bp": exact)::

        schedule = hb.schedules.Linear(hb.Highway(1), start=1, end=5)
        Trainer(hb.convert(model, hb.Highway(1)), ..., callbacks=[hb.trainer_callback(schedule)])

    Args:
        schedule: one of `highway_bp.schedules`.
        loss_fn: ``loss_fn(model)`` returns the loss of a batch. An `Adaptive` schedule measures the
            gradient's error with it; without ``loss_fn`` its k does not change.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class SetMethod(TrainerCallback):
        k: int | str | None = None

        def on_step_begin(self, args, state, control, model=None, **_) -> None:
            def measure(method: Method, ks: Sequence[int]) -> list[GradientError]:
                return gradient_error(model, loss_fn, ks, method)

            measured = None if loss_fn is None else measure
            method = schedule.method_for(state.global_step, state.max_steps, measured)
            set_method(model, method)
            self.k = getattr(method, "k", "bp")

        def on_log(self, args, state, control, logs=None, **_) -> None:
            for entry in (logs, state.log_history[-1]):
                entry["k"] = self.k

    return SetMethod()
