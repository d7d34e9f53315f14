"""Runs in a Trainer equal an independent reference: kernels in the autograd graph, a hand-written loop, the same draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sop import SimulatedOverparam
from tests.callbacks.helpers import Classifier, dataset, fit, overparam, seeded

FACTOR = 3


class Draws(Callback):
    """Writes down each step's mixes and the first kernels, and nothing else."""

    def __init__(self) -> None:
        self.mixes: list[dict[str, Tensor]] = []
        self.kernels: dict[str, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        engine = next(c for c in trainer.callbacks if isinstance(c, SimulatedOverparam)).engine
        if not self.kernels:
            self.kernels = {n: [p.detach().clone() for p in f.phi] for n, f in engine.forms.items()}
        self.mixes.append({name: form.mix.clone() for name, form in engine.forms.items()})


def reference(
    model: Classifier, draws: Draws, make: Any, *, accumulate: int = 1, clip: float | None = None, epochs: int = 2
) -> tuple[list[float], dict[str, list[Tensor]]]:
    """Plain torch: W = Σ v_i K_i in the graph; the plain gradient is clipped; autograd takes it to the kernels."""
    kernels = {name: [k.clone().requires_grad_() for k in group] for name, group in draws.kernels.items()}
    rest = {name: p for name, p in model.named_parameters() if name not in kernels}
    optimizer = make([*(k for group in kernels.values() for k in group), *rest.values()])
    loader = torch.utils.data.DataLoader(dataset(), batch_size=16)
    losses = []
    for epoch in range(epochs):
        weights: dict[str, Tensor] = {}
        for index, (inputs, labels) in enumerate(loader):
            first = index % accumulate == 0
            if first:
                mixes = draws.mixes[epoch * len(loader) + index]
                weights = {n: sum(k * float(v) for k, v in zip(g, mixes[n], strict=True)) for n, g in kernels.items()}
                leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
                optimizer.zero_grad()
            loss = F.cross_entropy(functional_call(model, {**leaves, **rest}, (inputs,)), labels)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (index + 1) % accumulate and index + 1 < len(loader):
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([*leaves.values(), *rest.values()], clip)
            for name, weight in weights.items():
                weight.backward(FACTOR * leaves[name].grad)
            optimizer.step()
    return losses, kernels


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Double(Classifier):
    """In float64 rounding cannot hide a mistake, nor pass for one."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer, shuffle=False, dropout=0.0)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.hparams["optimizer"]](self.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 0.05}, {"accumulate": 2, "clip": 0.05}], ids=str)
def test_run_equals_the_autograd_twin(optimizer: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, twin = seeded(Double, optimizer), seeded(Double, optimizer)
        trainer_options = {
            "accumulate_grad_batches": options.get("accumulate", 1),
            "gradient_clip_val": options.get("clip"),
            "precision": "64-true",
        }
        run = fit(model, tmp_path, overparam(FACTOR, seed=1), Draws(), **trainer_options)
        ours, draws = run.callbacks[0], run.callbacks[1]
        losses, kernels = reference(twin, draws, OPTIMIZERS[optimizer], **options)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model.losses, losses, rtol=1e-7, atol=1e-7)  # the data are float32
    for name, group in kernels.items():
        for left, right in zip(ours.engine.forms[name].phi, group, strict=True):
            torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-6, atol=1e-7)


def test_fp16_scaling_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """The scale is a power of two: the kernels get the gradient that they would get without it, in half precision."""

    class Half(Classifier):
        def __init__(self) -> None:
            super().__init__("sgd", shuffle=False, dropout=0.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)

    def run(scale: float) -> Classifier:
        model = seeded(Half)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        fit(model, tmp_path, overparam(FACTOR, seed=1), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return model

    one, large = run(1.0), run(2.0**10)
    torch.testing.assert_close(one.losses, large.losses, rtol=1e-3, atol=1e-3)
