"""LightningModules that can grow, donors for them, and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sop import AtStep, DeepFusionGrow
from tests.callbacks.helpers import dataset, fit, same_tensors, seeded


def network(width: int, dropout: float = 0.0) -> nn.Sequential:
    layers = (
        nn.Linear(10, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.Linear(width, 5))


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    held = list(parameters)
    return {
        "adamw": lambda: torch.optim.AdamW(held, lr=1e-2),
        "adam": lambda: torch.optim.Adam(held, lr=1e-2),
        "sgd": lambda: torch.optim.SGD(held, lr=5e-2, momentum=0.9, weight_decay=1e-3),
        "lbfgs": lambda: torch.optim.LBFGS(held, lr=0.1, max_iter=3),
        "adafactor": lambda: torch.optim.Adafactor(held, lr=1e-2),
        "asgd": lambda: torch.optim.ASGD(held, lr=1e-2),
    }[name]()


class Growable(pl.LightningModule):
    """A user's module, as plain as they come; keeps its losses."""

    def __init__(self, width: int = 8, optimizer: str = "adamw", dropout: float = 0.0, scheduler: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network(width, dropout)
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.hparams["optimizer"], self.parameters())
        if not self.hparams["scheduler"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=16)

    val_dataloader = test_dataloader = train_dataloader


def grow(at: int | None = 6, width: int = 16, **options: Any) -> DeepFusionGrow:
    """Growth of the run's own network in its second epoch (an epoch has four steps)."""
    schedule = {} if at is None else {"schedule": AtStep(at)}
    return DeepFusionGrow(**{"grown": {"width": width}, "verbose": False, **schedule, **options})


def every_epoch(folder: Path | str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def make(**options: Any) -> Growable:
    return seeded(Growable, **options)


def donor(folder: Path, name: str, seed: int, epochs: int = 1, **options: Any) -> str:
    """The path of a trained checkpoint."""
    torch.manual_seed(seed)
    model = options.pop("model", None) or Growable(**options)
    fit(model, folder / name, ModelCheckpoint(folder, filename=name, enable_version_counter=False), max_epochs=epochs)
    return str(folder / f"{name}.ckpt")


class Watch(Callback):
    """Calls a function after each batch, listed behind all others."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.look(trainer, pl_module)

    def __deepcopy__(self, memo: Any) -> Watch:
        return self


def same_run(left: pl.Trainer, right: pl.Trainer) -> bool:
    """Whether two runs have come to the same weights, optimizer and scheduler states, and growth, bit for bit."""
    pairs = [(left.lightning_module.state_dict(), right.lightning_module.state_dict())]
    pairs += [(a.state_dict(), b.state_dict()) for a, b in zip(left.optimizers, right.optimizers, strict=True)]
    events = [[c for c in run.callbacks if isinstance(c, DeepFusionGrow)] for run in (left, right)]
    pairs += [(a.state_dict(), b.state_dict()) for a, b in zip(*events, strict=True)]
    pairs += [
        (a.scheduler.state_dict(), b.scheduler.state_dict())
        for a, b in zip(left.lr_scheduler_configs, right.lr_scheduler_configs, strict=True)
    ]
    return all(same_tensors(dict(a), dict(b)) for a, b in pairs)
