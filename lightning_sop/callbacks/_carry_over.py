"""What a growing run takes along: what its optimizers remember, and its learning rates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.callbacks._growing import SELF, Donor, silent
from lightning_sop.deploy.replay import isolated_random_state
from lightning_sop.growth import Fusion
from lightning_sop.growth.backward_error import matched_rates

#: Optimizers whose updates do not depend on the gradient's scale (subclasses count).
_NORMALIZING = frozenset(
    ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop", "Muon", "Adafactor")
)


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


def matched_factors(
    trainer: Trainer,
    fusion: Fusion,
    donors: Sequence[LightningModule],
    grown: LightningModule,
    batch: Any,
    index: int,
) -> dict[str, float]:
    """Multipliers of the learning rate by parameter name, from the fused network's gradient on the current batch."""
    gradient = gradient_of_step(grown, batch, index)
    if gradient is None:
        rank_zero_info(
            "DeepFusionGrow: training_step gives no loss outside of its Trainer, so the learning rates stay as they are."
        )
        return {}
    if trainer.world_size > 1:  # each rank has its own batch
        gradient = {name: trainer.strategy.reduce(tensor, reduce_op="mean") for name, tensor in gradient.items()}
    normalizing = all({c.__name__ for c in type(o).__mro__} & _NORMALIZING for o in trainer.optimizers)
    kind: Literal["sgd", "adam"] = "adam" if normalizing else "sgd"
    sources = [donors[fusion.op.sources.index(source)].state_dict() for source in range(fusion.op.number_of_sources)]
    return matched_rates(fusion.op, sources, gradient, optimizer=kind)


def gradient_of_step(module: LightningModule, batch: Any, index: int) -> dict[str, Tensor] | None:
    """The gradient of a training step's loss, without dropout; None where the step does not work outside of a Trainer."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.eval()
    try:
        with silent(), isolated_random_state(), torch.enable_grad():
            result = module.training_step(batch, index)
            loss = result["loss"] if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                return None
            values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    except Exception:  # the user's step, outside of its Trainer: anything may happen
        return None
    finally:
        module.train()
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


def restart(scheduler: Any) -> None:
    """A scheduler as it was before its first step, with the learning rates of then."""
    for group in scheduler.optimizer.param_groups:
        if "initial_lr" in group:
            group["lr"] = group["initial_lr"]
    scheduler.last_epoch = -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it steps before the optimizer
        if hasattr(scheduler, "_initial_step"):
            scheduler._initial_step()
