"""Overcomplete linear expansion: each weight is trained as a product of two larger matrices, and deployed as one."""

from __future__ import annotations

import math
from collections import Counter

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Product(nn.Module):
    """A weight (out, …) as second @ first, with its other axes flattened: for a convolution, a 1x1 one after its kernel.

    Both factors are drawn at random, in balance; the least change of one of them makes the product the weight there was.

    Args:
        shape: of the weight.
        inner: units between the factors, at least the smaller side of the flattened weight.
    """

    def __init__(self, shape: torch.Size, inner: int) -> None:
        super().__init__()
        self.shape, self.inner = shape, inner

    def forward(self, second: Tensor, first: Tensor) -> Tensor:
        return (second @ first).view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        flat = weight.flatten(1)
        scale = float(flat.square().mean().sqrt() / math.sqrt(self.inner)) ** 0.5
        second, first = scale * torch.randn(len(flat), self.inner), scale * torch.randn(self.inner, flat.shape[1])
        second, first = second.to(flat), first.to(flat)
        rest = flat - second @ first
        if self.inner >= flat.shape[1]:
            return second + rest @ torch.linalg.pinv(first), first
        return second, first + torch.linalg.pinv(second) @ rest


def inner_units(shape: torch.Size, factor: float) -> int:
    """So many that the factors have ``factor`` times the parameters of the weight, and can represent every weight."""
    rows, columns = shape[0], shape[1:].numel()
    return max(min(rows, columns), round(factor * rows * columns / (rows + columns)))


def expand(module: nn.Module, factor: float) -> int:
    """Expand the weights of linear and convolution layers and the input projections of attention, unless they are shared.

    Returns:
        Parameters that were added.
    """
    # not parameters(), which gives shared ones once
    shared = Counter(
        id(parameter) for part in module.modules() for parameter in part._parameters.values() if parameter is not None
    )
    before = sum(parameter.numel() for parameter in module.parameters())
    for part in list(module.modules()):
        name = "in_proj_weight" if isinstance(part, nn.MultiheadAttention) else "weight"
        weight = part._parameters.get(name)
        if not isinstance(part, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) or weight is None or shared[id(weight)] > 1:
            continue
        product = Product(weight.shape, inner_units(weight.shape, factor))
        parametrize.register_parametrization(part, name, product)
    return sum(parameter.numel() for parameter in module.parameters()) - before


def collapsed_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of the network that is deployed: a copy of the module's own, with products multiplied."""
    state = {name: tensor for name, tensor in module.state_dict().items() if ".parametrizations." not in f".{name}"}
    for path, part in module.named_modules():
        for name in getattr(part, "parametrizations", {}):
            state[f"{path}.{name}" if path else name] = getattr(part, name)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Overcomplete(Callback):
    """Train with expanded weights.

    Args:
        factor: parameters of the factors, in those of the weight.
    """

    def __init__(self, factor: float = 4) -> None:
        self.factor = factor
        self.extra_parameters = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.extra_parameters = expand(pl_module, self.factor)
