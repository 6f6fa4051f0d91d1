"""The parts of a bundle, for scripts/bundle.py."""
