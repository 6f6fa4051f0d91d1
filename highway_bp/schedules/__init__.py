"""Schedules: which gradient method is used at which step of training.

k is small while short paths are enough, and large or exact at the end, where the bias of an
approximate gradient would show. A schedule gives the method of a step; you set it in your own
training loop:

    >>> schedule = hb.schedules.Milestones(hb.Highway(1), ks=(1, 5, "bp"), at=(0.3, 0.9))
    >>> [getattr(schedule.method_for(step, 10), "k", "bp") for step in range(10)]
    [1, 1, 1, 5, 5, 5, 5, 5, 5, 'bp']
"""

from highway_bp.schedules.adaptive import Adaptive
from highway_bp.schedules.fixed import BpEvery, Constant, Cosine, Linear, Milestones
from highway_bp.schedules.schedule import Schedule

__all__ = ["Adaptive", "BpEvery", "Constant", "Cosine", "Linear", "Milestones", "Schedule"]
