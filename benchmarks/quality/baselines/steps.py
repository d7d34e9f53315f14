"""Methods that change a module's training step, as mixins: a copy of the module on which costs are counted has them, too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.sgd import SGD

from benchmarks.quality.baselines.averaging import mean_log_probability
from lightning_sop import MajorityKernels


def become(module: pl.LightningModule, mixin: type, **attributes: Any) -> None:
    """Give a module a mixin's methods."""
    module.__class__ = type(f"{mixin.__name__}{type(module).__name__}", (mixin, type(module)), {})
    for name, value in attributes.items():
        setattr(module, name, value)


class Distilled(pl.LightningModule):
    """Trained on (1 - mix) cross-entropy + mix T² KL(teachers ‖ student) at temperature T (Hinton et al., 2015).

    The teachers' probabilities at that temperature are averaged. They are computed in each step, as they would be for images
    that are augmented.
    """

    temperature: float
    mix: float
    teachers: Sequence[torch.nn.Module] = ()
    _logits: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = super().forward(inputs)
        self._logits = logits if self.training else None
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hard = super().training_step(batch, batch_idx)
        logits, self._logits = self._logits, None
        assert isinstance(hard, Tensor)
        assert logits is not None
        with torch.no_grad(), _layer_by_layer():
            soft = mean_log_probability([teacher(batch[0]) for teacher in self.teachers], self.temperature)
        return (1 - self.mix) * hard + self.mix * self.temperature**2 * divergence(soft, logits / self.temperature)


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Transformers' layers for inference are one operation, of which no FLOPs are counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target ‖ softmax(logits)) for log-probabilities (…, classes): the mean over all else."""
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean()


def distill(module: pl.LightningModule, temperature: float, mix: float) -> None:
    """Teachers are set afterwards, as ``module.teachers``."""
    become(module, Distilled, temperature=temperature, mix=mix)


class Penalized(pl.LightningModule):
    """Trained on loss + strength (h/4) (A - 1) ‖g‖²; h is the current learning rate, g the gradient of the loss."""

    strength: float
    amplification: float
    rate: float

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.rate = cast(Any, self.optimizers(use_pl_optimizer=False)).param_groups[0]["lr"]
        return super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return cast(Tensor, super().training_step(batch, batch_idx))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        square = sum((gradient.square().sum() for gradient in gradients), loss.new_zeros(()))
        penalty = self.strength * self.rate / 4 * (self.amplification - 1) * square
        super().backward(loss + penalty, *args, **kwargs)


def penalize(module: pl.LightningModule, factor: int, draw: str, strength: float) -> None:
    """What Majority Kernels with that factor and draw adds to the implicit penalty of the gradient."""
    rate = float(cast(Any, module).lr)
    become(module, Penalized, strength=strength, amplification=amplification(factor, draw), rate=rate)


def amplification(factor: int, draw: str) -> float:
    """A = k E‖v‖²: exactly for Dirichlet(1), else from draws of a fixed seed (three digits)."""
    if draw == "dirichlet":
        return 2 * factor / (factor + 1)
    generator = torch.Generator().manual_seed(0)
    mixes = MajorityKernels(factor, draw=cast(Any, draw))._simplex(200_000, generator)
    return factor * float(mixes.square().sum(0).mean())


class Momentum(pl.LightningModule):
    """Trained by SGD with Nesterov momentum and the zoo's cosine instead of AdamW."""

    momentum: float

    def configure_optimizers(self) -> Any:
        module = cast(Any, self)
        optimizer = SGD(
            self.parameters(),
            lr=module.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=module.weight_decay,
        )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            return optimizer
        scheduler = CosineAnnealingLR(optimizer, T_max=max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def use_sgd(module: pl.LightningModule, momentum: float = 0.9) -> None:
    """SGD in place of AdamW."""
    become(module, Momentum, momentum=momentum)
