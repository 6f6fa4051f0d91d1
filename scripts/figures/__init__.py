"""What scripts/make_figures.py draws."""
