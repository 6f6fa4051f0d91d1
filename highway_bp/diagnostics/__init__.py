"""Measure or estimate the effect of k on a model's gradients and times; recommend a method."""
