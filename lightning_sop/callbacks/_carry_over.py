"""What a growing run takes along: what its optimizers remember, its schedulers, and its learning rates."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_sop.callbacks._growing import SELF, Donor
from lightning_sop.callbacks._growing_run import mean_over_ranks, silent
from lightning_sop.callbacks._step_loss import loss_of_step
from lightning_sop.deploy.replay import isolated_random_state
from lightning_sop.growth import Fusion
from lightning_sop.growth.backward_error import split
from lightning_sop.growth.optimizers import plain_name
from lightning_sop.growth.rates import StepRates, rates_by_tensor
from lightning_sop.growth.warm_up import Opening, boosts_of

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow

#: Options of an optimizer's groups that schedulers change.
_SCHEDULED = ("lr", "momentum", "betas")


def remembered(
    optimizers: Sequence[Optimizer], donor: Donor, names: Mapping[nn.Parameter, str]
) -> list[dict[str, Mapping[str, Any]]]:
    """By optimizer and parameter name, what a donor's optimizers remember; empty where there is nothing.

    Args:
        optimizers: of the run; those of a donor from a file are taken to have held the same parameters in the same order.
        donor: the run's own network, or one from a file.
        names: of the run's parameters.
    """
    if donor.name == SELF:
        return [
            {name: dict(optimizer.state[p]) for p, name in names.items() if optimizer.state.get(p)}
            for optimizer in optimizers
        ]
    result: list[dict[str, Mapping[str, Any]]] = []
    for number, optimizer in enumerate(optimizers):
        held = [names.get(p, "") for group in optimizer.param_groups for p in group["params"]]
        saved = donor.optimizer_states[number] if number < len(donor.optimizer_states) else {"param_groups": []}
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        alike = len(held) == len(indices)
        result.append({n: saved["state"].get(i, {}) for n, i in zip(held, indices, strict=True)} if alike else {})
    return result


def remembered_by(trainer: Trainer, donors: Sequence[Donor]) -> list[list[dict[str, Mapping[str, Any]]]]:
    """By optimizer, what those of each donor remember."""
    names = {parameter: plain_name(name) for name, parameter in trainer.lightning_module.named_parameters()}
    states = [remembered(trainer.optimizers, donor, names) for donor in donors]
    return [[state[number] for state in states] for number in range(len(trainer.optimizers))]


def matched_factors(
    trainer: Trainer,
    fusion: Fusion,
    donors: Sequence[LightningModule],
    fused: LightningModule,
    batch: Any,
    index: int,
    *,
    warm_up: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """Multipliers of the learning rate by parameter name, from the fused network's gradient on the current batch.

    Args:
        trainer: of the run.
        fusion: what was done.
        donors: the networks that were fused.
        fused: the grown network; not to be used afterwards.
        batch: as for a training step.
        index: of the batch.
        warm_up: whether the boosts are wanted.

    Returns:
        The multipliers, and the boosts of a warm-up (:mod:`lightning_sop.growth.warm_up`).
    """
    module, tensors = trainer.lightning_module, fused.state_dict()
    gradient, reason = {}, ""
    try:
        gradient = gradient_of_step(trainer, fused, batch, index)
    except Exception as error:  # the user's step, outside of its Trainer: anything may happen
        reason = f"{type(error).__name__}: {error}"
    if not trainer.strategy.reduce_boolean_decision(not reason, all=True):
        rank_zero_info(
            "DeepFusionGrow: training_step gives no gradient outside of its Trainer "
            f"({reason or 'in another process'}), so the learning rates stay as they are."
        )
        return {}, {}
    mean = mean_over_ranks(trainer)
    if mean is not None:  # each rank has its own batch
        gradient = {name: mean(tensor) for name, tensor in gradient.items()}
    sources = [donors[fusion.op.sources.index(source)].state_dict() for source in range(fusion.op.number_of_sources)]
    named = {plain_name(name): parameter for name, parameter in module.named_parameters()}

    def rates(gradient: Mapping[str, Tensor]) -> dict[str, float]:
        return rates_by_tensor(trainer.optimizers, named, fusion.op, sources, tensors, gradient)

    # What is new adds to the gradient. If the sum kept its speed, tensors with new features would stand still just where
    # the old ones have nothing left to learn: so it is what the donors can do that keeps it.
    whole = rates(gradient) if fusion.op.copies_only else {}
    if fusion.op.copies_only and not warm_up:
        return whole, {}
    image = split(fusion.op, gradient, sources)[0]
    alone = rates({name: image[name] for name in gradient if name in fusion.layout.tensors and name in image})
    return (whole, boosts_of(whole, alone)) if fusion.op.copies_only else (alone, {})


def gradient_of_step(trainer: Trainer, network: LightningModule, batch: Any, index: int) -> dict[str, Tensor]:
    """The gradient of a training step's loss.

    Args:
        trainer: of the run.
        network: computes it, without dropout; normalizes by the batch where the module in training does so.
        batch: as for a training step.
        index: of the batch.

    Raises:
        Exception: the step does not work outside of a Trainer.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    training = {plain_name(path): part.training for path, part in trainer.lightning_module.named_modules()}
    network.eval()
    for path, part in network.named_modules():
        if isinstance(part, _BatchNorm):
            part.train(training.get(path, True))
    with silent(), isolated_random_state(), torch.enable_grad():
        loss = loss_of_step(trainer, network, batch, index)
        values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if v is None else v for (n, p), v in zip(named.items(), values, strict=True)}


def combined(by_event: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The multipliers that growth events ask for together, by parameter name."""
    factors: dict[str, float] = {}
    for event in by_event:
        for name, factor in event.items():
            factors[name] = factors.get(name, 1.0) * factor
    return factors


def step_rates(
    optimizers: Sequence[Optimizer], module: LightningModule, events: Iterable[DeepFusionGrow]
) -> list[StepRates | Opening]:
    """Let the optimizers step with the rates that the growth events ask for together, and as the last one's warm-up says."""
    events, named = list(events), {plain_name(name): parameter for name, parameter in module.named_parameters()}
    together = combined(event._factors for event in events)
    factors = {parameter: together[name] for name, parameter in named.items() if name in together}
    rates = [StepRates(optimizer, factors) for optimizer in optimizers] if factors else []
    under_way = [event._warming for event in events if event._warming is not None]
    return [*rates, *(opening for warm_up in under_way for opening in warm_up.attach(optimizers, named, rates))]


@dataclass
class Beginning:
    """A scheduler before its first step, and the options of its optimizer's groups then."""

    scheduler: Any
    state: dict[str, Any]
    options: list[dict[str, Any]]

    @classmethod
    def of(cls, scheduler: Any) -> Beginning:
        """Remember how a scheduler starts."""
        groups = scheduler.optimizer.param_groups
        options = [{key: copy.copy(group[key]) for key in _SCHEDULED if key in group} for group in groups]
        return cls(scheduler, copy.deepcopy(scheduler.state_dict()), options)

    def restore(self) -> None:
        """Let it start again."""
        self.scheduler.load_state_dict(copy.deepcopy(self.state))
        for group, options in zip(self.scheduler.optimizer.param_groups, self.options, strict=False):
            group.update(copy.deepcopy(options))
