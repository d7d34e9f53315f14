"""What goes into ``Trainer(callbacks=[...])``."""

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow
from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam

__all__ = ["CollapseOnSave", "DeepFusionGrow", "SimulatedOverparam"]
