"""What k does to a model's gradients and times: measured, estimated, and turned into advice."""
