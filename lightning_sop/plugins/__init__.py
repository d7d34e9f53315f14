"""Lightning plugins."""

from lightning_sop.plugins.checkpoint_io import DeployCheckpointIO as DeployCheckpointIO
from lightning_sop.plugins.checkpoint_io import install as install

__all__ = ["DeployCheckpointIO", "install"]
