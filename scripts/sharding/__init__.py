"""Layers spread over processes: what is measured, what is predicted, and one beside the other."""
