"""With factor 1 a run is the plain run, bit for bit, whatever else is in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision

from tests.callbacks.helpers import Classifier, InConfigureModel, InSetup, Manual, fit, overparam, same_tensors, seeded


class Unfreeze(BaseFinetuning):
    """Trains the last layer first, all from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)


class Frozen(Classifier):
    """Gives the optimizer only what is trainable, as fine-tuning callbacks want it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2)


class WithBackbone(Frozen):
    """Has the attribute that BackboneFinetuning looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[0]


def half_with_scaler() -> dict[str, Any]:
    """fp16 with a real GradScaler; 16-mixed on the CPU would silently be bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)  # so large that steps are skipped
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


CASES: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "adamw": (Classifier, [], {}),
    "sgd": (lambda: Classifier("sgd"), [], {}),
    "lbfgs": (lambda: Classifier("lbfgs"), [], {}),
    "accumulation": (Classifier, [], {"accumulate_grad_batches": 3}),
    "accumulation_scheduler": (Classifier, [GradientAccumulationScheduler({0: 1, 1: 2})], {}),
    "clip_norm": (Classifier, [], {"gradient_clip_val": 0.05}),
    "clip_value": (Classifier, [], {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "manual": (Manual, [], {}),
    "setup": (InSetup, [], {}),
    "configure_model": (InConfigureModel, [], {}),
    "bf16-mixed": (Classifier, [], {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, [], {"precision": "bf16-true"}),
    "64-true": (Classifier, [], {"precision": "64-true"}),
    "ema": (Classifier, [EMAWeightAveraging(decay=0.9)], {}),
    "swa": (Classifier, [StochasticWeightAveraging(1e-2, swa_epoch_start=1)], {"max_epochs": 4}),
    "lr_finder": (Classifier, [LearningRateFinder(num_training_steps=12)], {}),
    "batch_size_finder": (Classifier, [BatchSizeFinder(max_trials=2, steps_per_trial=2)], {}),
    "finetuning": (Frozen, [Unfreeze()], {"max_epochs": 3}),
    "backbone": (WithBackbone, [BackboneFinetuning(1, verbose=False)], {"max_epochs": 3}),
    "early_stopping": (Classifier, [EarlyStopping("val_loss", patience=1, min_delta=10.0)], {"max_epochs": 6}),
}


@pytest.mark.filterwarnings("ignore:.*")  # the plain run's own: this test compares, it does not judge Lightning
@pytest.mark.parametrize("ours_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("case", CASES)
def test_run_is_the_plain_run(case: str, ours_first: bool, tmp_path: Path) -> None:
    make, callbacks, options = CASES[case]
    plain, ours = seeded(make), seeded(make)
    mine = [overparam(1)]
    run = fit(plain, tmp_path, *callbacks, **options)
    other = fit(ours, tmp_path, *(mine + callbacks if ours_first else callbacks + mine), **options)
    assert ours.losses == plain.losses
    assert same_tensors(dict(ours.state_dict()), dict(plain.state_dict()))
    assert other.global_step == run.global_step
    for left, right in zip(other.optimizers, run.optimizers, strict=True):
        if case != "lbfgs":  # it keeps everything with its first parameter, whose plain image is empty
            assert same_tensors(left.state_dict(), right.state_dict())
    assert torch.equal(torch.get_rng_state(), _rng_after(make, callbacks, options, tmp_path))


def _rng_after(make: Any, callbacks: list[Any], options: dict[str, Any], folder: Path) -> torch.Tensor:
    """Global random state after the plain run."""
    state = torch.get_rng_state()
    fit(seeded(make), folder, *callbacks, **options)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    return expected


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_with_skipped_steps_is_the_plain_run(fused: bool, tmp_path: Path) -> None:
    class Half(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=fused)

    plain, ours = seeded(Half), seeded(Half)
    fit(plain, tmp_path, max_epochs=6, **half_with_scaler())
    fit(ours, tmp_path, overparam(1), max_epochs=6, **half_with_scaler())
    assert ours.losses == plain.losses
    assert same_tensors(dict(ours.state_dict()), dict(plain.state_dict()))
    assert len(set(plain.losses[:2])) == 2  # it did train
