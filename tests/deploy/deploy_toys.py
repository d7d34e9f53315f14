"""Small models, data and Trainers of the deploy tests; also imported where lightning_sop is not installed."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(pl.LightningModule):
    """A classifier with BatchNorm and dropout."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class NoForward(Toy):
    """Its forward cannot be used; its step calls the parts."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class NoHyperParameters(Toy):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)


class Tied(Toy):
    """Two names, one parameter."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.net[2].weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.net(x)))


class CompiledInside(Toy):
    """Compiles a part of itself, which gives that part's weights names with ``_orig_mod.``."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.net = torch.compile(self.net, backend="eager")


class Kernels(Callback):
    """Stands in for SimulatedOverparam: claims to know every matrix from elsewhere; ``error`` plants a wrong collapse."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.model: pl.LightningModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.model = pl_module

    def collapsed_weights(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        assert self.model is not None
        named = self.model.named_parameters(remove_duplicate=False)
        weights = {name: p.detach().double() for name, p in named if p.dim() > 1}
        if self.error:
            weights["head.weight"] = weights["head.weight"] + self.error
        return weights


def data(batch_size: int = 8, samples: int = 24) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=batch_size)


def trainer(folder: object, *callbacks: Callback, **options: object) -> pl.Trainer:
    settings: dict[str, object] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())


def fit(folder: Path, *callbacks: Callback, model: Toy | None = None, **options: object) -> tuple[pl.Trainer, Toy]:
    model = Toy() if model is None else model
    run = trainer(folder, *callbacks, **options)
    run.fit(model, data(), data())
    return run, model


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    return [name for name, value in a.state_dict().items() if not torch.equal(value, b.state_dict()[name])]


class Extras(Toy):
    """Keeps something of its own in checkpoints, and has a hyper-parameter that is no plain data."""

    def __init__(self, activation=torch.nn.ReLU, width: int = 6) -> None:
        super().__init__(width)
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = ["a", "b"]

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["vocabulary"] == ["a", "b"]
