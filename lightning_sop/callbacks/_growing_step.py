"""The growth of a run: prepared on copies, where anything may fail, and then done."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sop.callbacks._carry_over import matched_factors, remembered_by
from lightning_sop.callbacks._growing import SELF, Donor, build, check_rebuilt, load_donor, networks_of, wider
from lightning_sop.callbacks._growing_run import check_adopted, wrap_again
from lightning_sop.callbacks._growing_shape import become, growing
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._step_loss import choice_options, frozen_as
from lightning_sop.deploy.replay import Call, first_floating
from lightning_sop.growth import Fusion, FusionError, fuse
from lightning_sop.growth.check import check_shapes
from lightning_sop.growth.moments import grow_optimizer_state
from lightning_sop.growth.norms import group_like_
from lightning_sop.growth.optimizers import enlist, home_of, plain_name, replace_parameters
from lightning_sop.growth.warm_up import WarmUp

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow


Grow = Callable[["DeepFusionGrow", Trainer, LightningModule, list[Call], Any, int], None]


class Observer(Protocol):
    """Looks at the growths of a run; must not raise."""

    def before_growth(self, event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> None:
        """The donors are there, and everything is as it was."""

    def after_growth(self, event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> None:
        """The network has grown."""


def observed(grow: Grow) -> Grow:
    """Let an event's observers look before and after."""

    @functools.wraps(grow)
    def observe(
        event: DeepFusionGrow, trainer: Trainer, module: LightningModule, calls: list[Call], batch: Any, index: int
    ) -> None:
        for observer in event.observers:
            observer.before_growth(event, trainer, batch, index)
        grow(event, trainer, module, calls, batch, index)
        for observer in event.observers:
            observer.after_growth(event, trainer, batch, index)

    return observe


def check_ahead(event: DeepFusionGrow, network: LightningModule, trainer: Trainer) -> LightningModule:
    """Load an event's donors and compare names and shapes; returns what the network is to become.

    Args:
        event: keeps the donors.
        network: what the module will be when it grows, a copy.
        trainer: of the run.

    Raises:
        FusionError: names the file or the parameter.
    """
    network._trainer = trainer  # which a setup() that makes layers may ask
    if event.target is None:
        check_rebuilt(network)
    paths = [name for name in dict.fromkeys(event.donors) if name != SELF]
    event.loaded = {path: load_donor(path, network) for path in paths}
    grown = wider(network, event.grown, event.target)
    donors = [network if name == SELF else event.loaded[name].module or network for name in event.donors]
    try:
        check_shapes(donors, grown, new_units=event.widen is not None)
    except FusionError as error:
        raise FusionError(f"donors {', '.join(event.donors)}: {error}") from error
    return grown


@dataclass
class Growth:
    """A growth that is ready to happen.

    Attributes:
        fusion: how the donors were fused.
        grown: the grown network, with its weights.
        changes: hyper-parameters that change.
        targets: attributes that are replaced instead.
        before: the network built with its old hyper-parameters.
        carried: by optimizer, the grown state by parameter name.
        factors: of the learning rates, by parameter name.
        warm_up: of the directions that are new, if there is to be one.
    """

    fusion: Fusion
    grown: LightningModule
    changes: Mapping[str, Any]
    targets: tuple[str, ...]
    before: LightningModule | None
    carried: list[dict[str, dict[str, Any]]]
    factors: dict[str, float]
    warm_up: WarmUp | None

    def happen(self, trainer: Trainer) -> None:
        """Give module and optimizers their new tensors; the warm-up of an earlier growth ends."""
        module = trainer.lightning_module
        for event in growing(trainer):
            event._warming = None
        known = {plain_name(name) for name, _ in module.named_parameters()}
        successors = become(module, self.grown, self.changes, self.targets, self.before)
        live = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        for optimizer, entries in zip(trainer.optimizers, self.carried, strict=True):
            state = {live[name]: entry for name, entry in entries.items()}
            replace_parameters(optimizer, successors, state, restart=live.values())
        enlist(trainer.optimizers, live, [name for name in live if name not in known])
        wrap_again(trainer, module)


def prepare(event: DeepFusionGrow, trainer: Trainer, calls: list[Call], batch: Any, index: int) -> Growth:
    """Fuse, prove, and carry over what the optimizers remember; nothing of the run is changed.

    Args:
        event: its options.
        trainer: of the run.
        calls: to probe with.
        batch: the current one, for new units and the learning rates.
        index: of the batch.

    Raises:
        FusionError: the fused network is not what it should be.
    """
    module = trainer.lightning_module
    here = plain_copy(module)
    dtype = torch.promote_types(first_floating(here).dtype, torch.float32)  # what is proven is not rounded
    networks = networks_of(event.loaded, here)
    donors = [networks[name].to(here.device, dtype) for name in event.donors]
    grown = wider(module, event.grown, event.target).to(here.device, dtype)
    fused = copy.deepcopy(grown)  # which is called; what it keeps of that is not taken over
    choice = choice_options(event, trainer, module, batch, index)
    with frozen_as(module, fused):
        fusion = fuse(donors, fused, calls, **event.options, **choice)
    group_like_(grown, fused.state_dict())
    grown.load_state_dict(fused.state_dict())
    changes, targets = ({}, (event.target,)) if event.target else (event.grown, ())
    before = None if targets else build(module, {})
    twin = plain_copy(module).to(here.device, dtype)
    become(twin, copy.deepcopy(grown), changes, targets, before)
    check_adopted(twin, fused, calls, event.tolerance)

    mine = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    for name, _ in twin.named_parameters():
        if name not in mine:  # of a new block
            home_of(name, trainer.optimizers, mine)
    held = remembered_by(trainer, [event.loaded.get(name) or Donor(SELF) for name in dict.fromkeys(event.donors)])
    carry, tensors = event.optimizer_state or grow_optimizer_state, dict(twin.named_parameters())
    carried = [
        carry(fusion.op, optimizer, states, tensors) for optimizer, states in zip(trainer.optimizers, held, strict=True)
    ]
    factors: dict[str, float] = {}
    boosts: dict[str, float] = {}
    if event.learning_rate == "match":
        factors, boosts = matched_factors(trainer, fusion, donors, fused, batch, index, warm_up=event.warm_up > 0)
    elif isinstance(event.learning_rate, (int, float)):
        factors = {name: float(event.learning_rate) for name in mine}
    warm_up = WarmUp.after(fusion.op, event.warm_up, boosts) if event.warm_up else None
    return Growth(fusion, grown, changes, targets, before, carried, factors, warm_up)
