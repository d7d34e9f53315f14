"""Growing networks in width: trained networks fused into a larger one (Deep Fusion, arXiv 2306.11903). Pure torch."""

from lightning_sop.growth.backward_error_schedule import BackwardErrorSchedule
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.evidence import Evidence, Growth, Laboratory
from lightning_sop.growth.fuse import Fusion, GrowthOp, fuse
from lightning_sop.growth.layout import Layout, TensorMap
from lightning_sop.growth.schedule import AtFraction, AtStep, Moment, OnPlateau, Schedule
from lightning_sop.growth.verify import Proof

__all__ = [
    "AtFraction",
    "AtStep",
    "BackwardErrorSchedule",
    "Evidence",
    "Fusion",
    "FusionError",
    "Growth",
    "GrowthOp",
    "Laboratory",
    "Layout",
    "Moment",
    "OnPlateau",
    "Proof",
    "Schedule",
    "TensorMap",
    "fuse",
]
