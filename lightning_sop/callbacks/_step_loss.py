"""The loss of a training step as a function of a network, by whose gradient new units are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sop.callbacks._growing_run import mean_over_ranks, silent
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._training_step import loss_of
from lightning_sop.deploy.replay import first_floating, isolated_random_state, map_tensors
from lightning_sop.growth import FusionError
from lightning_sop.growth.optimizers import plain_name

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow


def choice_options(
    event: DeepFusionGrow, trainer: Trainer | None, module: LightningModule, batch: Any, index: int
) -> dict[str, Any]:
    """What :func:`~lightning_sop.growth.fuse` needs beside an event's options: a loss, where it chooses new units by one.

    Args:
        event: its options.
        trainer: of the run; its processes choose by the mean of their gradients. None outside of a run.
        module: of the class that grows.
        batch: as for a training step; each process has its own.
        index: of the batch.

    Raises:
        FusionError: the step gives no loss outside of its Trainer.
    """
    if event.widen != "gradmax":
        return {}
    check_loss(trainer, module, batch, index)
    mean = None if trainer is None else mean_over_ranks(trainer)
    return {"loss": partial(loss_of_step, trainer, batch=batch, index=index), "mean": mean}


def check_loss(trainer: Trainer | None, module: LightningModule, batch: Any, index: int) -> None:
    """Raise, in all processes, where ``training_step`` gives no loss outside of its Trainer in one of them.

    Raises:
        FusionError: says why.
    """
    reason = ""
    try:
        with isolated_random_state(), torch.enable_grad():
            loss = loss_of_step(trainer, plain_copy(module).eval().requires_grad_(True), batch, index)
            reason = "" if loss.requires_grad else "the loss has no graph"
    except Exception as error:  # the user's step, outside of its Trainer: anything may happen
        reason = f"{type(error).__name__}: {error}"
    if trainer is None or trainer.world_size == 1:
        works = not reason
    else:
        works = trainer.strategy.reduce_boolean_decision(not reason, all=True)
    if not works:
        raise FusionError(
            "widen='gradmax' chooses new units by the gradient of a training step, but "
            f"{type(module).__name__}.training_step() gives no loss outside of its Trainer "
            f"({reason or 'in another process'}). Use widen='new'."
        )


def loss_of_step(trainer: Trainer | None, network: nn.Module, batch: Any, index: int) -> Tensor:
    """The loss of a training step.

    Raises:
        TypeError: the step returns none.
    """
    assert isinstance(network, LightningModule)
    dtype = first_floating(network).dtype
    inputs = map_tensors(lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone(), batch)
    with silent():
        return loss_of(trainer, network, inputs, index)


@contextmanager
def frozen_as(module: LightningModule, network: LightningModule) -> Iterator[None]:
    """Meanwhile a network's parameters are frozen where a module's are: units that cannot learn are not chosen."""
    before = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    frozen = {plain_name(name) for name, parameter in module.named_parameters() if not parameter.requires_grad}
    try:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(before[name] and name not in frozen)
        yield
    finally:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(before[name])
