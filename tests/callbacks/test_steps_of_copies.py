"""Training steps that are run on copies of a module: they know where in the run they are, and the run does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop import DynamicsMonitor, MajorityKernels, SimulatedOverparam, TrainingCost
from lightning_sop.callbacks._training_step import knowing
from tests.callbacks.growing import Growable, donor, grow
from tests.callbacks.helpers import Classifier, fit, seeded, trainer
from tests.callbacks.monitoring import monitored


class Part(pl.LightningModule):
    """Of another module."""

    def factor(self) -> int:
        return 1 + self.current_epoch


class Schedules(Classifier):
    """A loss whose weight depends on epoch and step, asked for in the module and in a part of it."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.part = Part()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1]) * (self.part.factor() + self.current_epoch + self.global_step)
        self.losses.append(loss.item())
        return loss


def test_losses_on_copies_are_those_of_the_epoch_and_step(tmp_path: Path) -> None:
    model = seeded(Schedules)
    kernels = SimulatedOverparam(MajorityKernels(3, init="independent"), verbose=False)
    rows = monitored(model, tmp_path, kernels, DynamicsMonitor(["loss/*"], every=1, slow=1), max_epochs=2)
    mixed = [row["loss/mixed"] for _, row in sorted(rows.items())]
    assert len(mixed) == 8
    assert mixed == pytest.approx(model.losses, rel=1e-5)


class Changes(Growable):
    """Trains something else in its first epoch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if not self.current_epoch:
            return sum(parameter.square().sum() for parameter in self.parameters())
        return super().training_step(batch, batch_idx)


def test_rates_after_growth_come_from_the_loss_of_that_epoch(tmp_path: Path) -> None:
    paths = [donor(tmp_path, f"donor{seed}", seed) for seed in (1, 2)]
    events = []
    for kind in (Changes, Growable):
        event = grow(at=4, donors=paths, learning_rate="match")
        trainer(tmp_path, event, max_epochs=2).fit(seeded(kind))
        events.append(event)
    assert events[0].grown_at == events[1].grown_at == 4
    assert events[0]._factors == events[1]._factors
    assert any(factor != 1 for factor in events[0]._factors.values())


def test_the_cost_of_a_resumed_run_is_that_of_its_epoch(tmp_path: Path) -> None:
    class Deeper(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if not self.current_epoch:
                return F.cross_entropy(self.net[4](F.pad(batch[0], (0, 22))), batch[1])
            return super().training_step(batch, batch_idx)

    fit(seeded(Deeper), tmp_path, ModelCheckpoint(tmp_path, filename="first"), max_epochs=1)
    cost, whole = TrainingCost(verbose=False), TrainingCost(verbose=False)
    with pytest.warns(UserWarning, match="Be aware that when using"):
        trainer(tmp_path, cost, max_epochs=2).fit(seeded(Deeper), ckpt_path=str(tmp_path / "first.ckpt"))
    trainer(tmp_path, whole, max_epochs=1).fit(seeded(Classifier))
    assert cost.flops == whole.flops


def test_a_user_s_class_hears_of_no_other(tmp_path: Path) -> None:
    registry = []

    class Base(Classifier):
        def __init_subclass__(cls, *, name: str, **options: Any) -> None:
            registry.append(name)
            super().__init_subclass__(**options)

    class Named(Base, name="named"):
        pass

    model = Named()
    run = fit(model, tmp_path, max_epochs=1)
    twin = copy.deepcopy(model)

    def step() -> None:
        with knowing(run, twin):
            assert (twin.current_epoch, twin.global_step) == (1, 4)
            assert isinstance(twin, Named) and type(twin).__name__ == "Named" and isinstance(twin.net, nn.Sequential)
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        step()
    assert type(twin) is Named and twin.current_epoch == 0
    assert registry == ["named"]
