"""The demo's runs: train, deploy, test the deployed file; and the time of a step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop import CollapseOnSave, MajorityKernels, SimulatedOverparam, expand_
from lightning_sop.deploy import deploy_path, read
from lightning_sop.zoo import Digits, ImageClassifier

STEPS_PER_BLOCK = 10
"""Steps that one network takes before the other has its turn, when the two are timed."""


@dataclass(frozen=True)
class Setting:
    """What every run of the demo shares.

    Attributes:
        width: units of each of the two hidden layers.
        factor: number of kernels per weight.
        epochs: passes over the 1077 training digits.
        lr: learning rate of AdamW, with a cosine to 0.
    """

    width: int = 128
    factor: int = 4
    epochs: int = 20
    lr: float = 3e-3

    def model(self) -> ImageClassifier:
        """The network of both arms, initialized from torch's global seed."""
        return ImageClassifier("mlp", width=self.width, lr=self.lr)


@dataclass(frozen=True)
class Run:
    """What one training came to.

    Attributes:
        parameters_training: trained values, in number.
        parameters_deployed: values of the deployed network, in number.
        deploy_bytes: size of the deploy file.
        output_difference: the receipt: largest difference between the outputs of the trained and the deployed network.
        test_loss: nats per image, of the network read back from the deploy file.
        test_acc: share of the test images that it classifies correctly.
        val_loss: nats per image after each epoch.
        val_acc: share correct after each epoch.
    """

    parameters_training: int
    parameters_deployed: int
    deploy_bytes: int
    output_difference: float | None
    test_loss: float
    test_acc: float
    val_loss: list[float]
    val_acc: list[float]


@dataclass
class Curve(Callback):
    """Collects the validation metrics of every epoch."""

    val_loss: list[float] = field(default_factory=list)
    val_acc: list[float] = field(default_factory=list)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.val_loss.append(float(trainer.callback_metrics["val_loss"]))
        self.val_acc.append(float(trainer.callback_metrics["val_acc"]))


def train(setting: Setting, seed: int, overparametrized: bool, folder: Path) -> Run:
    """Train one network, deploy its best epoch by validation loss, and test what the deploy file holds.

    Both arms of a seed see the same split, the same initial weights and the same order of images.

    Args:
        setting: what every run shares.
        seed: of the split, the initial weights and the order.
        overparametrized: whether to train with Majority Kernels.
        folder: where the checkpoints go.
    """
    data = Digits(seed=seed)
    torch.manual_seed(seed)
    model = setting.model()
    deployed_size = sum(parameter.numel() for parameter in model.parameters())
    trained_size = deployed_size
    curve, checkpoint = Curve(), ModelCheckpoint(folder, monitor="val_loss")
    callbacks: list[Callback] = [curve, checkpoint, CollapseOnSave()]
    if overparametrized:
        callback = SimulatedOverparam(MajorityKernels(factor=setting.factor), verbose=False)
        trained_size = callback.plan(model).numel[1]
        callbacks.append(callback)
    _trainer(setting, callbacks).fit(model, data)

    deploy_file = Path(deploy_path(checkpoint.best_model_path))
    deployed = ImageClassifier.load_from_checkpoint(deploy_file)
    (metrics,) = _trainer(setting, []).test(deployed, data, verbose=False)
    return Run(
        parameters_training=trained_size,
        parameters_deployed=deployed_size,
        deploy_bytes=deploy_file.stat().st_size,
        output_difference=read(deploy_file).receipt["output_difference"],
        test_loss=metrics["test_loss"],
        test_acc=metrics["test_acc"],
        val_loss=curve.val_loss,
        val_acc=curve.val_acc,
    )


def step_time_ratio(setting: Setting, blocks: int) -> float:
    """Time of an over-parametrized training step over that of a plain one: the median over interleaved blocks.

    Args:
        setting: the network and the number of kernels; the batch is one of 64 digits.
        blocks: pairs of blocks to time, after one that is not counted.
    """
    data = Digits()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    plain, expanded = setting.model().net, setting.model().net
    plain_step = _stepper(plain, torch.optim.AdamW(plain.parameters(), lr=setting.lr), images, labels)
    optimizer = torch.optim.AdamW(expanded.parameters(), lr=setting.lr)
    expand_(expanded, optimizer, MajorityKernels(factor=setting.factor))
    expanded_step = _stepper(expanded, optimizer, images, labels)
    ratios = [_seconds(expanded_step) / _seconds(plain_step) for _ in range(blocks + 1)]
    return statistics.median(ratios[1:])


def _trainer(setting: Setting, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=setting.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def _stepper(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_PER_BLOCK):
        step()
    return time.perf_counter() - start
