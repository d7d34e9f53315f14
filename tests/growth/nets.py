"""Small networks in float64, their data and gradients, for tests of what a growth does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.growth import GrowthOp, fuse
from lightning_sop.zoo.nets import Decoder

SEEDED = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 16, dtype=torch.float64, generator=SEEDED)
CLASSES = torch.randint(3, (64,), generator=SEEDED)
TOKENS = torch.randint(11, (16, 7), generator=SEEDED)
WEIGHTS = {"equal": (0.5, 0.5), "unequal": (0.3, 0.7)}
any_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]


def mlp(width: int, seed: int = 0, norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.LayerNorm(width) if norm else nn.Identity()
    layers = (nn.Linear(16, width), middle, nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return nn.Sequential(*layers).double()


def decoder(width: int, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    net = Decoder(11, 6, width=width, depth=2, heads=width // 4, tied=tied).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def classify(net: Callable[[Tensor], Tensor], rows: slice | Tensor = slice(None)) -> Tensor:
    return F.cross_entropy(net(INPUTS[rows]), CLASSES[rows])


def predict(net: Callable[[Tensor], Tensor], rows: slice | Tensor = slice(None)) -> Tensor:
    return F.cross_entropy(net(TOKENS[rows, :-1]).flatten(0, 1), TOKENS[rows, 1:].flatten())


def gradients(loss: Tensor, net: nn.Module) -> Gradients:
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def fused(small: Sequence[nn.Module], grown: nn.Module, probe: Tensor = INPUTS, **options: Any) -> GrowthOp:
    return fuse(small, grown, probe, **options).op


def states(*networks: nn.Module) -> list[Mapping[str, Tensor]]:
    return [dict(net.named_parameters()) for net in networks]


CASES = {
    "mlp": (mlp(7), lambda: mlp(14), classify, INPUTS, 1e-14),
    "mlp_norm": (mlp(7, norm=True), lambda: mlp(14, norm=True), classify, INPUTS, 1e-14),
    "decoder": (decoder(8, False), lambda: decoder(16, False), predict, TOKENS[:, :-1], 1e-12),
    "decoder_tied": (decoder(8, True), lambda: decoder(16, True), predict, TOKENS[:, :-1], 1e-12),
}
copies = pytest.mark.parametrize("case", CASES)
