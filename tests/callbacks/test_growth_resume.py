"""Resuming around a growth event is the uninterrupted run, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lightning_sop import DeepFusionGrow, OnPlateau
from tests.callbacks.growing import Growable, donor, every_epoch, grow, make, same_run
from tests.callbacks.helpers import fit, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Configured(Growable):
    """Its optimizer is made with it, as LightningCLI does, and is always the same object."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.made = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.made


class NeedsTrainer(Growable):
    """Its step works only inside of a Trainer."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        scale = 1.0 + 0.0 * self.trainer.global_step
        self.optimizers()
        return {"loss": scale * super().training_step(batch, batch_idx), "extra": 1}


def two_events() -> list[DeepFusionGrow]:
    return [grow(6), grow(14, width=48, copies=3)]


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (make, lambda: [grow()], {}),
    "sgd": (lambda: make(optimizer="sgd"), lambda: [grow()], {}),
    "keep": (make, lambda: [grow(learning_rate="keep")], {}),
    "restart": (make, lambda: [grow(learning_rate="restart")], {}),
    "number": (make, lambda: [grow(learning_rate=0.5)], {}),
    "adafactor": (lambda: make(optimizer="adafactor"), lambda: [grow()], {}),
    "accumulation": (make, lambda: [grow(3)], {"accumulate_grad_batches": 2}),
    "clipping": (make, lambda: [grow()], {"gradient_clip_val": 0.05}),
    "noise": (make, lambda: [grow(off_diagonal=0.01)], {}),
    "optimizer-from-outside": (lambda: seeded(Configured), lambda: [grow()], {}),
    "needs-trainer": (lambda: seeded(NeedsTrainer), lambda: [grow()], {}),
    "needs-trainer-accumulation": (lambda: seeded(NeedsTrainer), lambda: [grow(3)], {"accumulate_grad_batches": 2}),
    "plateau": (
        make,
        lambda: [grow(None, schedule=OnPlateau(patience=1, min_delta=10.0))],
        {},
    ),
    "bf16-true": (make, lambda: [grow()], {"precision": "bf16-true"}),
    "64-true": (lambda: make().double(), lambda: [grow()], {"precision": "64-true"}),
    "two-events": (make, two_events, {}),
    "two-events-sgd": (lambda: make(optimizer="sgd"), two_events, {}),
}


@pytest.mark.filterwarnings("ignore:.*bf16.*")
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise(case: str, tmp_path: Path) -> None:
    build, events, options = CASES[case]
    full = build()
    whole = fit(full, tmp_path, *events(), every_epoch(tmp_path), max_epochs=5, **options)
    width = 16 * len(events()) if len(events()) == 1 else 48
    assert full.net[0].out_features == full.net[0].weight.shape[0] == full.hparams["width"] == width
    for epoch in range(4):  # before, after, and between
        part = build()
        path = tmp_path / f"epoch={epoch}.ckpt"
        run = fit(part, tmp_path / "again", *events(), every_epoch(tmp_path / "again"), max_epochs=5, ckpt=path, **options)
        assert part.losses == full.losses[(epoch + 1) * 4 :]
        assert same_run(run, whole)


def test_resume_from_within_an_epoch_at_the_growth(tmp_path: Path) -> None:
    """The step before growth and the one after it are saved, too, also where growth waits for a step in its Trainer."""
    for build in (make, lambda: seeded(NeedsTrainer)):
        folder = tmp_path / build.__name__
        steps = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        full = build()
        fit(full, folder, grow(8), steps, max_epochs=3)
        shapes = [
            torch.load(folder / f"step={n}.ckpt", weights_only=True)["state_dict"]["net.0.weight"].shape for n in (8, 9)
        ]
        assert shapes == [(8, 10), (16, 10)]
        part = build()
        fit(part, folder / "again", grow(8), ckpt=folder / "step=8.ckpt", max_epochs=3)
        assert part.losses == full.losses[8:]


def test_resume_after_growth_needs_no_donor_files(tmp_path: Path) -> None:
    paths = [donor(tmp_path, "a", 1), donor(tmp_path, "b", 2, width=12)]
    events = grow(0, width=20, donors=paths)
    full = make(width=20)
    whole = fit(full, tmp_path, events, every_epoch(tmp_path / "saved"), max_epochs=3)
    for path in paths:
        Path(path).unlink()
    part = make(width=20)
    run = fit(part, tmp_path / "x", events, ckpt=tmp_path / "saved" / "epoch=0.ckpt", max_epochs=3)
    assert part.losses == full.losses[4:]
    assert same_run(run, whole)


def test_a_run_resumed_twice(tmp_path: Path) -> None:
    """The checkpoints of a resumed run, which began with the small network, resume again."""
    full = make()
    whole = fit(full, tmp_path, grow(), every_epoch(tmp_path), max_epochs=5)
    fit(make(), tmp_path / "x", grow(), every_epoch(tmp_path / "x"), max_epochs=3, ckpt=tmp_path / "epoch=1.ckpt")
    last = make()
    run = fit(last, tmp_path / "y", grow(), max_epochs=5, ckpt=tmp_path / "x" / "epoch=2.ckpt")
    assert last.losses == full.losses[12:]
    assert same_run(run, whole)


def test_a_module_that_is_wide_already_resumes(tmp_path: Path) -> None:
    """LightningCLI builds it with the hyper-parameters of the checkpoint."""
    full, wide = make(), make(width=16)
    whole = fit(full, tmp_path, grow(), every_epoch(tmp_path), max_epochs=4)
    run = fit(wide, tmp_path / "x", grow(), max_epochs=4, ckpt=tmp_path / "epoch=2.ckpt")
    assert wide.losses == full.losses[12:]
    assert same_run(run, whole)


def test_growth_happens_where_it_is_due(tmp_path: Path) -> None:
    model = make()
    run = fit(model, tmp_path, grow(6), max_epochs=3)
    event = run.callbacks[0]
    assert event.grown_at == 6 and event.fusion.proof.gap <= 1e-5
    plain = make()
    fit(plain, tmp_path, max_epochs=3)
    assert model.losses[:6] == plain.losses[:6]
    assert model.losses[6] == pytest.approx(plain.losses[6], rel=1e-4)  # the function is kept
    assert model.losses[9:] != plain.losses[9:]
    inputs = torch.randn(3, 10)
    assert model(inputs).shape == F.relu(model(inputs)).shape == (3, 5)
