"""Calling a module's ``training_step`` as Lightning does, and reading its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def call_step(module: LightningModule, batch: Any, index: int) -> Any:
    """What ``training_step`` returns; it may take the batch alone, or its index, too."""
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        return module.training_step(batch, index)
    return module.training_step(batch)


def loss_of(module: LightningModule, batch: Any, index: int) -> Tensor:
    """The loss of a training step.

    Raises:
        TypeError: it gives none.
    """
    loss = loss_if_any(module, batch, index)
    if loss is None:
        raise TypeError("training_step returns NoneType, not a loss")
    return loss


def loss_if_any(module: LightningModule, batch: Any, index: int) -> Tensor | None:
    """The loss of a training step; None for a step that Lightning would leave out.

    Raises:
        TypeError: it gives something else.
    """
    result = call_step(module, batch, index)
    loss = result["loss"] if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor | None):
        raise TypeError(f"training_step returns {type(loss).__name__}, not a loss")
    return loss
