"""Averages: of one run's weights over epochs, of several networks' weights, and of several networks' probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from lightning_sop.callbacks.batchnorm import BatchNormReestimation

State = Mapping[str, Tensor]


class EpochAverage(WeightAveraging):
    """Stochastic weight averaging (Izmailov et al., 2018): the mean of the weights at the ends of the last epochs.

    Before averaging begins, the weights themselves are validated. BatchNorm statistics are estimated anew for the average.

    Args:
        start: part of the epochs after which averaging begins.
        floor: the learning rate falls to this part of its first value and no lower, so that there is something to average.
        batches: of the training set for BatchNorm.
    """

    def __init__(self, start: float = 0.5, floor: float = 0.1, batches: int = 8) -> None:
        super().__init__()
        self.start, self.floor = start, floor
        self._batchnorm = BatchNormReestimation(batches)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batchnorm.attach(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._batchnorm.begin_step()
        # a cosine scheduler multiplies the rate that is there, so it stays below the floor once it got there
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = max(group["lr"], self.floor * group.get("initial_lr", group["lr"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        assert trainer.max_epochs is not None
        if trainer.current_epoch < self.start * trainer.max_epochs:
            self._average_model.n_averaged.zero_()  # the update copies then
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the last epoch is averaged after its validation, so that one is averaged here
        if trainer.state.fn == "fit":
            self.on_train_epoch_end(trainer, pl_module)
        super().on_validation_epoch_start(trainer, pl_module)
        if self._average_model is not None and int(self._average_model.n_averaged) > 1:
            self._batchnorm.run(pl_module, trainer.precision_plugin.forward_context())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._batchnorm.detach()


def mean_state(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each floating tensor; other tensors are those of the first."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in states[0].items()
    }


class MeanProbability(nn.Module):
    """Logarithms of the mean of several networks' probabilities; as logits they give these probabilities."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        return mean_log_probability([network(inputs) for network in self.networks], 1.0)


def mean_log_probability(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logarithms of the mean of softmax(logits / temperature) over the last axis."""
    stacked = torch.stack([(part / temperature).log_softmax(-1) for part in logits])
    return stacked.logsumexp(0) - torch.tensor(float(len(logits))).log().to(stacked)
