"""What k does to a model's gradients and times: measured, bounded, and turned into advice."""
