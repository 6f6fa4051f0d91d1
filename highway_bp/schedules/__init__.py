"""Schedules: which gradient method is in force at a step of training.

k small while short paths are enough, large or exact at the end, where the bias of an approximate
gradient would show. A schedule names the method of a step; the training loop stays its caller's::

    schedule = hb.schedules.Milestones(hb.Highway(1), ks=(1, 2, 5, "bp"), at=(0.3, 0.6, 0.9))
    hb.set_method(model, schedule.method_for(step, steps))
"""

from highway_bp.schedules.adaptive import Adaptive
from highway_bp.schedules.fixed import BpEvery, Constant, Cosine, Linear, Milestones
from highway_bp.schedules.schedule import Schedule

__all__ = ["Adaptive", "BpEvery", "Constant", "Cosine", "Linear", "Milestones", "Schedule"]
