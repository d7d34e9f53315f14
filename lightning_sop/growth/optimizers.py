"""Grown parameters in the place of the old ones, in an optimizer that stays the same object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.probe import pattern


def replace_parameters(
    optimizer: Optimizer,
    successors: Mapping[nn.Parameter, nn.Parameter],
    state: Mapping[nn.Parameter, dict[str, Any]],
    *,
    restart: Iterable[nn.Parameter] = (),
) -> None:
    """Let an optimizer go on with grown parameters: its groups, their options and its hooks stay as they are.

    Args:
        optimizer: changed in place.
        successors: the grown parameter by the old one that it replaces.
        state: the state of parameters, grown or changed in value, by parameter as it is afterwards; parameters that have a
            successor and no entry here start without a state.
        restart: parameters whose state is forgotten, too, where they have no entry in ``state``.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
    again = set(restart)
    for parameter in list(optimizer.state):
        if parameter in successors or (parameter in again and parameter not in state):
            del optimizer.state[parameter]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, entry in state.items():
        if id(parameter) in held:
            optimizer.state[parameter] = entry
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None  # it counts its parameters' values once


def enlist(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter], new: Iterable[str]) -> None:
    """Let optimizers hold the parameters of new blocks, where they hold those of the blocks beside them.

    Args:
        optimizers: changed in place, unless they hold the parameters already.
        parameters: of the grown network by name, in its order, which groups that follow it go on following.
        new: names of those that the network did not have before.
    """
    order = {id(parameter): number for number, parameter in enumerate(parameters.values())}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    fresh = [name for name in new if id(parameters[name]) not in held]
    old = {name: parameter for name, parameter in parameters.items() if name not in set(new)}
    homes = [home_of(name, optimizers, old) for name in fresh]
    for name, group in zip(fresh, homes, strict=True):
        if group is not None:
            places = [order.get(id(p), -1) for p in group["params"]]
            group["params"].append(parameters[name])
            if places == sorted(places):
                group["params"].sort(key=lambda p: order.get(id(p), -1))


def home_of(name: str, optimizers: Sequence[Optimizer], old: Mapping[str, nn.Parameter]) -> dict[str, Any] | None:
    """The group in which a new block's parameter belongs, or None where those of the other blocks are in none.

    Args:
        name: of the parameter.
        optimizers: of the run.
        old: the other blocks' parameters by name.

    Raises:
        FusionError: it has no counterpart in one group.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    counterparts = {id(parameter) for other, parameter in old.items() if pattern(other) == pattern(name)}
    homes = [group for group in groups if any(id(p) in counterparts for p in group["params"])]
    if counterparts and not homes:
        return None
    if not counterparts:
        homes = groups
    if len(homes) != 1:
        raise FusionError(
            f"{name} is new, and it is not clear which of {len(groups)} parameter groups is to hold it: those of the same "
            f"kind are in {len(homes)}"
        )
    return homes[0]


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of ``torch.compile``."""
    return name.replace("_orig_mod.", "")
