"""What a Lightning run offers to a schedule that tries growth out: batches, and copies of its module and optimizers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sop.callbacks._carry_over import combined, remembered_by
from lightning_sop.callbacks._fresh_batches import UnreadableAgainError, fresh_batches
from lightning_sop.callbacks._growing import SELF, Donor, networks_of, wider
from lightning_sop.callbacks._growing_run import calls_of_step, mean_over_ranks, moment_of, shared, silent
from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._step_loss import check_loss, choice_options
from lightning_sop.callbacks._terminal import LateBar, show
from lightning_sop.callbacks._training_step import loss_of
from lightning_sop.deploy.replay import first_floating, isolated_random_state, map_tensors
from lightning_sop.growth import Evidence, Growth, Laboratory, fuse
from lightning_sop.growth.evidence import held_out
from lightning_sop.growth.schedule import Schedule

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow

_Step = tuple[Any, int]  # a batch and its index


class RunLaboratory:
    """Gives a growth event's schedule the batches that it wants, and lets it look at the run between two steps.

    Args:
        event: its options, schedule and donors.
    """

    def __init__(self, event: DeepFusionGrow) -> None:
        self._event = event
        self._kept: deque[_Step] = deque()
        self._keeping = False
        self._cannot_draw = False
        self._tested = False

    def before_step(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Evidence | None:
        """Between two optimizer steps, before the schedule is asked whether growth is due.

        Args:
            trainer: of the run.
            module: in training.
            batch: the next one.
            index: of the batch.

        Returns:
            What the schedule has measured and logged, if it did.

        Raises:
            MisconfigurationException: at the first step of a run whose ``training_step`` gives no loss outside of its
                Trainer, for a schedule that needs that.
        """
        schedule, moment = self._event.schedule, moment_of(trainer, {})
        wanted = schedule.wants(moment)
        if not self._tested:
            self._tested = True
            if self._event.widen == "gradmax":
                check_loss(trainer, module, batch, index)
            if type(schedule).consider is not Schedule.consider:  # it may want to
                self._test(trainer, module, batch, index)
        if not wanted:  # as at most steps
            self.close()
            return None
        with LateBar(trainer, "Growth tried out") as bar:
            found = self._batches(trainer, wanted, bar)
            self._keeping = found is None
            if found is None:
                return None
            self._kept.clear()
            evidence = schedule.consider(self._laboratory(trainer, module, (batch, index), found, bar), moment)
        if evidence is not None:
            self._report(trainer, evidence)
        return evidence

    def after_batch(self, batch: Any, index: int) -> None:
        """Keep a batch that was trained on, where no others can be had."""
        if self._keeping:
            self._kept.append((batch, index))

    def _batches(self, trainer: Trainer, wanted: int, bar: LateBar) -> tuple[list[_Step], list[_Step]] | None:
        """So many batches and those that rollouts are judged by, or None as long as there are not enough."""
        if not self._cannot_draw:
            bar.show("reading batches", 0, None)
            drawn, reason = None, "another process cannot read its data"
            try:
                drawn = fresh_batches(trainer, wanted, held_out(wanted))
            except UnreadableAgainError as error:
                reason = str(error)
            if trainer.strategy.reduce_boolean_decision(drawn is not None, all=True):
                assert drawn is not None
                steps = [(batch, number) for number, batch in enumerate([*drawn[0], *drawn[1]])]
                return steps[:wanted], steps[wanted:]
            self._cannot_draw = True
            rank_zero_warn(
                f"{type(self._event.schedule).__name__} gets the last {wanted} batches that the run was trained on, for "
                f"others cannot be drawn: {reason}. A step lowers the gradient on its own batch, so growth/T comes out too "
                "large; growth/gain, from training copies, decides."
            )
        return (list(self._kept)[-wanted:], []) if len(self._kept) >= wanted else None

    def close(self) -> None:
        """Let go of the batches."""
        self._kept.clear()
        self._keeping = False

    def _test(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        copied = plain_copy(module)
        copied.eval()
        try:
            with torch.no_grad(), isolated_random_state():
                _loss(trainer, copied, (map_tensors(torch.Tensor.clone, batch), index))
        except Exception as error:  # the user's step, outside of its Trainer: anything may happen
            raise MisconfigurationException(
                f"{type(self._event.schedule).__name__} tries growth out on copies of the module, but its training_step "
                f"gives no loss outside of its Trainer ({type(error).__name__}: {error}). Use another schedule, such as "
                "AtFraction."
            ) from error

    def _laboratory(
        self, trainer: Trainer, module: LightningModule, coming: _Step, found: tuple[list[_Step], list[_Step]], bar: LateBar
    ) -> Laboratory:
        rate = self._event.learning_rate
        return Laboratory(
            small=module,
            grow=lambda small: self._grow(trainer, module, small, coming),
            loss=lambda network, batch: _loss(trainer, network, batch),
            batches=found[0],
            held_out=found[1],
            optimizers=trainer.optimizers,
            factor=None if rate == "match" else 1.0 if isinstance(rate, str) else float(rate),
            factors=combined(other._factors for other in growing(trainer)),
            batches_per_step=trainer.accumulate_grad_batches,
            warm_up=self._event.warm_up,
            duplicate=_plain,
            mean=mean_over_ranks(trainer),
            clip=None if not trainer.gradient_clip_val else lambda parameters: _clip(trainer, parameters),
            progress=bar.show,
        )

    def _grow(self, trainer: Trainer, module: LightningModule, small: nn.Module, coming: _Step) -> Growth:
        event = self._event
        assert isinstance(small, LightningModule)
        calls = shared(trainer, calls_of_step(trainer, small, *coming))
        networks = networks_of(event.loaded, small)
        donors = [networks[name].to(small.device) for name in event.donors]
        grown = wider(module, event.grown, event.target)
        grown = grown.to(small.device, first_floating(small).dtype)
        frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
        for name, parameter in grown.named_parameters():
            parameter.requires_grad_(name not in frozen)
        choice = choice_options(event, trainer, small, *coming)
        fusion = fuse(donors, grown, calls, **event.options, **choice)
        names = list(dict.fromkeys(event.donors))
        if names == [SELF]:
            return Growth(fusion, grown, probe=calls)
        held = remembered_by(trainer, [event.loaded.get(name) or Donor(SELF) for name in names])
        return Growth(fusion, grown, [networks[name] for name in names], held, calls)

    def _report(self, trainer: Trainer, evidence: Evidence) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(evidence.metrics(), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        if evidence.steps:
            show(
                trainer,
                self._event.verbose,
                f"[bold]{type(self._event.schedule).__name__}[/bold] at step {trainer.global_step}: in {evidence.steps} "
                f"steps on copies the grown network lowers the loss {evidence.gain:.3g} times as much per FLOP; "
                f"{'it grows' if evidence.grow else 'it does not grow yet'}",
            )


def _loss(trainer: Trainer, network: nn.Module, batch: tuple[Any, int]) -> Tensor:
    """The loss of a training step, computed as in the run; without autocast where that would need a gradient scaler."""
    assert isinstance(network, LightningModule)
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    with silent(), nullcontext() if scaled else trainer.precision_plugin.train_step_context():
        return loss_of(trainer, network, *batch)


def _plain(module: nn.Module) -> nn.Module:
    assert isinstance(module, LightningModule)
    return plain_copy(module)


def _clip(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> None:
    limit = float(trainer.gradient_clip_val or 0.0)
    if str(getattr(trainer.gradient_clip_algorithm, "value", "norm")) == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    else:
        nn.utils.clip_grad_norm_(parameters, limit)
