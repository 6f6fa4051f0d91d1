"""What scripts/make_tables.py writes."""
