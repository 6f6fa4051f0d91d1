"""Rows of finished runs: which stand for what, and what they say of the claims."""
