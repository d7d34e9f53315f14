"""Small LightningModules and a Trainer for them, made for comparing runs bit by bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sop import MajorityKernels, SimulatedOverparam


def overparam(factor: int = 3, **options: Any) -> SimulatedOverparam:
    """The callback under test, without its table."""
    return SimulatedOverparam(MajorityKernels(factor), verbose=False, **options)


def dataset(size: int = 64, width: int = 10, classes: int = 5) -> TensorDataset:
    """Real arithmetic, no download: which of the first inputs is the largest."""
    inputs = torch.randn(size, width, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :classes].argmax(1))


def network(width: int = 10, hidden: int = 32, classes: int = 5) -> nn.Sequential:
    """Linear layers with BatchNorm and dropout between them."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, classes)
    )


class Classifier(pl.LightningModule):
    """A user's module, as plain as they come; keeps its losses."""

    def __init__(self, optimizer: str = "adamw", lr: float = 1e-2, shuffle: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.batch_size = 16
        self.net = network()
        self.net[3].p = dropout
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=self.lr),
            "sgd": lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9, weight_decay=1e-3),
            "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
        }[self.hparams["optimizer"]]
        optimizer = make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=self.batch_size, shuffle=self.hparams["shuffle"])

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Manual(Classifier):
    """Two networks against each other, two optimizers stepped by hand: one wrapped, one raw, one gradient clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(5, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) + self.critic(self.net(batch[0])).mean()
        self.losses.append(loss.item())
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        first.step()
        raw = second.optimizer
        raw.zero_grad()
        self.manual_backward(-self.critic(self.net(batch[0]).detach()).mean())
        raw.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2), torch.optim.SGD(self.critic.parameters(), lr=1e-2)


class InSetup(Classifier):
    """Makes its layers in setup()."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class InConfigureModel(Classifier):
    """Makes its layers in configure_model()."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()


def trainer(folder: Path | str, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer; checkpointing is on when a ModelCheckpoint is among the callbacks."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def fit(model: pl.LightningModule, folder: Path | str, *callbacks: Callback, ckpt: Any = None, **options: Any) -> pl.Trainer:
    """Train from fixed global random states and return the Trainer."""
    torch.manual_seed(11)
    run = trainer(folder, *copy.deepcopy(callbacks), **options)
    run.fit(model, ckpt_path=ckpt)
    return run


def run_script(folder: Path, script: str) -> None:
    """Run a script that names ``{root}``, of the repository, and ``{folder}``, apart from the test runner."""
    file = folder / "run.py"
    file.write_text(script.format(root=str(Path(__file__).parents[2]), folder=str(folder)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "LOCAL_RANK"))}
    command = [sys.executable, "-W", "ignore", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    """A model with the same initial weights each time."""
    torch.manual_seed(7)
    return make(*args, **kwargs)


def same_tensors(left: Any, right: Any) -> bool:
    """Whether two state_dicts (or nested containers) hold the same bits."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_tensors(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_tensors, left, right))
    return bool(left == right)
