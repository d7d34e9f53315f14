"""What a growth event tells the run's count of costs: its checks, its own work, its donors."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_sop.callbacks._growing import SELF, Donor
from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._growing_step import Grow
from lightning_sop.callbacks.training_cost import TrainingCost
from lightning_sop.deploy.replay import Call
from lightning_sop.dynamics.cost import CHECKS, GROWTH, Phase
from lightning_sop.dynamics.flops import flop_counter
from lightning_sop.growth import Evidence, Schedule

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow


def bring_costs(trainer: Trainer) -> None:
    """See to it that the costs of a run that grows are counted: once, whoever wants that."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if costs_of(trainer) is None:
        place = next((n for n, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
        asked = [event.verbose for event in growing(trainer)]
        callbacks.insert(place, TrainingCost(verbose=True in asked or (None if None in asked else False)))


def costs_of(trainer: Trainer) -> TrainingCost | None:
    """The count of a run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, TrainingCost)), None)


def check(event: DeepFusionGrow, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Evidence | None:
    """Let an event's schedule look at the run, and count what that costs."""
    costs, look = costs_of(trainer), event.laboratory.before_step
    if costs is None or type(event.schedule).consider is Schedule.consider:  # which looks at nothing
        return look(trainer, module, batch, index)
    before = getattr(event.schedule, "spent", None)
    with costs.phase(CHECKS):
        evidence = look(trainer, module, batch, index)
    flops = evidence.flops if evidence is not None else 0.0
    if before is not None:  # also for checks that came to nothing
        flops = event.schedule.spent - before  # type: ignore[attr-defined]
    if flops:
        costs.ledger.add(CHECKS, Phase(flops=flops * trainer.world_size))
    return evidence


def counted(grow: Grow) -> Grow:
    """Count what a growth costs, and what the network costs from then on."""

    @functools.wraps(grow)
    def count(
        event: DeepFusionGrow, trainer: Trainer, module: LightningModule, calls: list[Call], batch: Any, index: int
    ) -> None:
        costs = costs_of(trainer)
        if costs is None:
            return grow(event, trainer, module, calls, batch, index)
        with costs.growth(trainer, module, batch, index, donor_costs(event, trainer, batch, index)):
            with flop_counter() as counter:
                grow(event, trainer, module, calls, batch, index)
            costs.ledger.add(GROWTH, Phase(flops=float(counter.get_total_flops()) * trainer.world_size))

    return count


def donor_costs(event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> dict[str, Phase]:
    """What the training of an event's donors has cost, by file; the network itself costs nothing more."""
    donors = [event.loaded[name] for name in dict.fromkeys(event.donors) if name != SELF and name in event.loaded]
    return {_place(donor.name): _cost_of(donor, trainer, batch, index) for donor in donors}


def _cost_of(donor: Donor, trainer: Trainer, batch: Any, index: int) -> Phase:
    """As its file says; where that does not, its batches times what one of this run costs in it."""
    cost, costs, module = donor.cost, costs_of(trainer), trainer.lightning_module
    batches = cost.batches or cost.steps * trainer.accumulate_grad_batches
    if not math.isnan(cost.flops) or not batches or donor.module is None or costs is None:
        return cost
    found = costs.batch_cost.counted(trainer, donor.module, batch, index)
    if found is None:  # the step needs its Trainer: by the numbers of weights
        here = costs.batch_cost.of(trainer, module, batch, index)
        sizes = [sum(p.numel() for p in network.parameters()) for network in (donor.module, module)]
        flops = math.nan if here is None else here.flops * sizes[0] / sizes[1]
    else:
        flops = found.flops
    return replace(cost, batches=batches, flops=flops * batches * trainer.world_size, estimated=True)


def _place(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)
