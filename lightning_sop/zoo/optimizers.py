"""The zoo's own optimizer, for when none is configured from outside."""

import math

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR


def adamw_cosine(module: LightningModule, lr: float, weight_decay: float) -> OptimizerLRScheduler:
    """AdamW whose learning rate falls along a half cosine to 0 over all steps of the fit.

    Args:
        module: module attached to a Trainer; all its parameters are optimized.
        lr: learning rate of the first step.
        weight_decay: decoupled weight decay, in units of the learning rate.

    Returns:
        What ``configure_optimizers`` returns; without a scheduler when the Trainer's number of steps is unlimited.
    """
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    steps = module.trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        return optimizer
    scheduler = CosineAnnealingLR(optimizer, T_max=max(1, int(steps)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
