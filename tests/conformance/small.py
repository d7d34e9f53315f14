"""A small network with a bit of everything, for what does not depend on the architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

TOKENS = 7


class SmallNet(nn.Module):
    """Embedding tied to the head, a convolution, BatchNorm, dropout, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.1)
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, TOKENS)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(self.second(torch.tanh(self.first(self.drop(x)))))


def small_net(dtype: torch.dtype = torch.float64) -> SmallNet:
    torch.manual_seed(3)
    return SmallNet().to(dtype)


def batch() -> Tensor:
    return torch.arange(20).reshape(4, 5) * 3 % TOKENS


def loss_of(model: nn.Module) -> Tensor:
    tokens = batch()
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Steps of a plain loop, with fixed dropout; returns the losses."""
    losses = []
    for step in range(steps):
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a state_dict holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
