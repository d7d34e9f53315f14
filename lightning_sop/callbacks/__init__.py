"""What goes into ``Trainer(callbacks=[...])``."""

from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam

__all__ = ["SimulatedOverparam"]
