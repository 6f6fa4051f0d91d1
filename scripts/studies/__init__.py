"""Short programs that look at finished runs: not needed for figures, tables and the page."""
