"""Grown parameters in the place of the old ones, in an optimizer that stays the same object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def replace_parameters(
    optimizer: Optimizer,
    successors: Mapping[nn.Parameter, nn.Parameter],
    state: Mapping[nn.Parameter, dict[str, Any]],
    *,
    restart: bool = False,
) -> None:
    """Let an optimizer go on with grown parameters: its groups, their options and its hooks stay as they are.

    Args:
        optimizer: changed in place.
        successors: the grown parameter by the old one that it replaces.
        state: the state of parameters, grown or changed in value, by parameter as it is afterwards; parameters that have a
            successor and no entry here start without a state.
        restart: forget the state of every parameter of this optimizer that has no entry in ``state``.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
    for parameter in list(optimizer.state):
        if parameter in successors or (restart and parameter not in state):
            del optimizer.state[parameter]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, entry in state.items():
        if id(parameter) in held:
            optimizer.state[parameter] = entry
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None  # it counts its parameters' values once


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of ``torch.compile``."""
    return name.replace("_orig_mod.", "")
