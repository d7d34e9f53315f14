"""Gradient noise (Neelakantan et al., 2015)."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class GradientNoise(Callback):
    """Adds Gaussian noise of variance eta / (1 + step)^gamma to each gradient, before it is clipped.

    Its random numbers come from a generator of its own, seeded by torch's seed: data and dropout are the plain run's.
    """

    def __init__(self, eta: float = 1e-6, gamma: float = 0.55) -> None:
        self.eta, self.gamma = eta, gamma
        self._generator: torch.Generator | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._generator = torch.Generator(pl_module.device).manual_seed(torch.initial_seed())

    def std(self, step: int) -> float:
        """Of the noise at a step, from 0."""
        return float((self.eta / (1 + step) ** self.gamma) ** 0.5)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        std = self.std(trainer.global_step)
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                shape, device, dtype = parameter.shape, parameter.device, parameter.dtype
                noise = torch.randn(shape, generator=self._generator, device=device, dtype=dtype)
                parameter.grad.add_(noise, alpha=std)
