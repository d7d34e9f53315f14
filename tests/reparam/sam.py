"""Sharpness-aware minimization, as users write it: with the closure called twice, and around a base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def ascent(parameters: list[Tensor], rho: float) -> list[Tensor]:
    """Moves along the gradient, of length ``rho`` in all."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    return [rho * p.grad / norm for p in parameters]


class WholeStepSAM(SGD):
    """Calls the closure twice: at the weights, and uphill of them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        parameters = self._parameters()
        moves = ascent(parameters, 0.05)
        torch._foreach_add_(parameters, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(self._parameters(), moves)
        super().step()
        return loss

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class TwoStepSAM(Optimizer):
    """In two halves, with the groups of a base optimizer; a whole step expects the first gradient to be there."""

    def __init__(self, params: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, move in zip(parameters, ascent(parameters, 0.05), strict=True):
            self.state[parameter]["before"] = parameter.detach().clone()
            parameter.add_(move)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["before"]
        self.base.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
