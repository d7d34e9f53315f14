"""The error that growth raises."""


class FusionError(ValueError):
    """The donors cannot be fused into the grown model as asked; the message names the parameter and the way out."""
