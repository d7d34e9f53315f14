"""A float64 network, its twin of autograd, and a loss, for tests of the step cycle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam import Engine
from tests.conformance.references import ConvexMix
from tests.conformance.twin import Twin


def perceptron(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: Callable[[Tensor], Tensor], step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Distance to a fixed nonlinear map, on a batch that changes with the step."""
    x = torch.sin(torch.arange(32, dtype=dtype) * (step + 1)).reshape(8, 4)
    return (model(x) - torch.stack([x[:, 0] * x[:, 1], x[:, 2], x.sum(1)], 1)).square().mean()


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, **options)


def is_plain(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer's groups and state are those of the plain model."""
    own = [id(p) for p in model.parameters()]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return held == own and {id(p) for p in optimizer.state} <= set(own)


@dataclass
class Pair:
    """A network in training form and its twin, each with an optimizer of the same kind."""

    make: Callable[[Any], Optimizer]
    method: MajorityKernels = field(default_factory=lambda: MajorityKernels(3))
    bias: bool = True

    def __post_init__(self) -> None:
        self.model = perceptron(self.bias)
        plain = copy.deepcopy(self.model)
        self.optimizer = self.make(self.model.parameters())
        self.engine: Engine = expand_(self.model, self.optimizer, self.method, seed=3)
        self.twin = Twin(plain, self.engine, ConvexMix(self.method.factor, self.method.gradient_scale))
        self.twin_optimizer = self.make(self.twin.parameters())

    @property
    def sides(self) -> tuple[tuple[Any, Optimizer], ...]:
        """The twin first: the network's step draws anew."""
        return (self.twin, self.twin_optimizer), (self.model, self.optimizer)

    def gap(self) -> float:
        return self.twin.gap(self.model)
