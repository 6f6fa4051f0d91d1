"""Other people's residual models, trained by a gradient method (`convert.convert`)."""
