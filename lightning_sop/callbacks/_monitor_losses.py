"""Losses of a run's networks outside of its own steps, on copies; the run does not notice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_sop.callbacks._growing_run import silent
from lightning_sop.callbacks._monitor_layers import engines_of
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._training_step import loss_if_any
from lightning_sop.deploy.replay import first_floating, isolated_random_state, map_tensors
from lightning_sop.dynamics.losses import loss_gap
from lightning_sop.growth.optimizers import plain_name
from lightning_sop.growth.rollout import quiet_


class Losses:
    """Evaluates training steps on copies of a module, as long as that works on every rank.

    Attributes:
        wanted: False where this rank takes no further part: then all give up together, at the next evaluation.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._works = True

    def gap(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> tuple[float, float] | None:
        """Loss of a batch under the mixed weights of the step, and under the collapsed ones, means over ranks.

        Returns:
            None where no weight is mixed, or a training step does not work outside of its Trainer.
        """
        forms = [form for engine in engines_of(trainer) for form in engine.forms.values()]
        forms = [form for form in forms if form.built and form.mix is not None and form.parameter.requires_grad]

        def evaluate() -> Sequence[Tensor]:
            mixed, collapsed = {}, {}
            for form in forms:
                name = plain_name(form.site.name)
                mixed[name], collapsed[name] = torch.empty_like(form.parameter), form.collapsed()
                form.method.write(mixed[name], form.phi, form.mix, form.site)
            loss = functools.partial(_loss, trainer, batch, index)
            return loss_gap(loss, functools.partial(subject_of, module), mixed, collapsed)

        values = self._together(trainer, evaluate) if forms else None
        return None if values is None else (values[0], values[1])

    def of(self, trainer: Trainer, networks: Mapping[str, LightningModule], batch: Any, index: int) -> dict[str, float]:
        """Losses of networks on one batch, means over ranks; empty where a step does not work outside of its Trainer.

        Args:
            trainer: of the run.
            networks: of the module's class; copied.
            batch: of the run.
            index: of the batch.
        """
        like = first_floating(trainer.lightning_module)

        def evaluate() -> Sequence[Tensor]:
            subjects = (subject_of(network).to(like.device, like.dtype) for network in networks.values())
            return [_loss(trainer, batch, index, subject) for subject in subjects]

        values = self._together(trainer, evaluate)
        return {} if values is None else dict(zip(networks, values, strict=True))

    @torch.no_grad()
    def _together(self, trainer: Trainer, evaluate: Callable[[], Sequence[Tensor]]) -> list[float] | None:
        """The means over ranks, if every rank has something; one transfer."""
        # A step that calls its optimizers by itself would train.
        if not (self._works and trainer.lightning_module.automatic_optimization):
            return None
        found: Sequence[Tensor] = ()
        reason = "another rank takes no part"
        if self.wanted:
            try:
                found = evaluate()
            except Exception as error:  # the user's step, outside of its Trainer: anything may happen
                reason = f"its training_step gives none outside of its Trainer ({type(error).__name__}: {error})"
        self._works = bool(found)
        if trainer.world_size > 1:
            self._works = trainer.strategy.reduce_boolean_decision(self._works, all=True)
        if not self._works:
            if self.wanted:
                rank_zero_warn(
                    "DynamicsMonitor: losses on copies of the module (loss/…, growth/donor_loss, growth/fused_loss) are "
                    f"left out, because {reason}."
                )
            return None
        values = torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in found])
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        return [float(value) for value in values.tolist()]


def subject_of(module: LightningModule) -> LightningModule:
    """A copy for evaluation: plain layers, no dropout, norms over the batch."""
    copied = plain_copy(module)
    quiet_(copied)
    return copied


def _loss(trainer: Trainer, batch: Any, index: int, network: nn.Module) -> Tensor:
    """The loss of a training step, computed as in the run; every call draws the same random numbers, if any."""
    assert isinstance(network, LightningModule)
    context: AbstractContextManager[Any] = trainer.precision_plugin.train_step_context() or nullcontext()
    with silent(), isolated_random_state(), context:
        loss = loss_if_any(trainer, network, map_tensors(torch.Tensor.clone, batch), index)
    return torch.full((), torch.nan, device=network.device) if loss is None else loss.detach().reshape(())
