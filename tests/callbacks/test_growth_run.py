"""What a run takes along through its growth: optimizer, scheduler, scaler, learning rates, random state."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sop import AtFraction, AtStep, DeepFusionGrow, OnPlateau
from lightning_sop.growth import Moment, Schedule
from tests.callbacks.growing import Growable, Watch, every_epoch, grow, make
from tests.callbacks.helpers import dataset, fit, seeded, trainer


class OneBatch(Growable):
    """The same batch in every step, so that one update is much like the next."""

    def train_dataloader(self) -> DataLoader[Any]:
        first = [dataset()[n] for n in range(16)]
        return DataLoader([*first * 12], batch_size=16)


class Updates(Callback):
    """The update of every step, by parameter name."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.updates.append({name: p.detach() - self.before[name] for name, p in pl_module.named_parameters()})

    def __deepcopy__(self, memo: Any) -> Updates:
        return self


@pytest.mark.parametrize("rate", ["match", "keep"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_first_update_is_no_spike(optimizer: str, rate: str, tmp_path: Path) -> None:
    """Its norm per old parameter is within a factor 2 of the step before, and no value moves twice as much as before."""
    seen = Updates()
    fit(seeded(OneBatch, optimizer=optimizer), tmp_path, grow(6, learning_rate=rate), seen, max_epochs=1)
    last, first = seen.updates[5], seen.updates[6]
    norms = [math.sqrt(sum(float(u.square().sum()) for u in updates.values())) for updates in (last, first)]
    assert 0.5 <= norms[1] / norms[0] <= 2
    for name, update in first.items():
        assert float(update.square().mean().sqrt()) <= 2 * float(last[name].square().mean().sqrt()), name
    assert first["net.0.weight"].shape == (16, 10)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_same_objects_go_on(tmp_path: Path) -> None:
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)  # so large that steps are skipped
    seen: list[Any] = []

    def look(run: pl.Trainer, module: pl.LightningModule) -> None:
        [config] = run.lr_scheduler_configs
        ids = [id(run.optimizers[0]), id(run.strategy._lightning_optimizers[0]), id(config.scheduler)]
        ids += [id(run.precision_plugin.scaler), id(module), id(module.net), id(module.net[0]), id(module.net[6].bias)]
        ids += [id(group) for group in run.optimizers[0].param_groups]
        options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in run.optimizers[0].param_groups]
        seen.append((ids, options, run.optimizers[0].param_groups[0]["lr"]))
        held = [id(p) for group in run.optimizers[0].param_groups for p in group["params"]]
        assert held == [id(p) for p in module.parameters()]
        assert set(map(id, run.optimizers[0].state)) <= set(held)

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    run = fit(model, tmp_path, grow(6), Watch(look), max_epochs=4, plugins=[plugin])
    assert model.net[0].out_features == 16 and run.precision_plugin.scaler.get_scale() < 2.0**30
    assert all(ids == seen[0][0] and options == seen[0][1] for ids, options, _ in seen)
    rates = [rate for _, _, rate in seen]
    assert rates == pytest.approx([1e-2 * 0.9**n for n in range(len(rates))]) or rates == pytest.approx(
        [1e-2 * 0.9 ** (n + 1) for n in range(len(rates))]
    )


@pytest.mark.parametrize("case", ["adamw", "16-mixed", "manual", "two-events"])
def test_rates_are_split_only_inside_step(case: str, tmp_path: Path) -> None:
    counts: list[tuple[str, int]] = []

    class Look(Callback):
        def note(self, where: str, run: pl.Trainer) -> None:
            counts.append((where, len(run.optimizers[0].param_groups)))

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.note("start", trainer)

        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            self.note("closure", trainer)

        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            self.note("closure", trainer)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.note("end", trainer)

    inside: list[int] = []

    class Spied(torch.optim.AdamW):
        def _init_group(self, group: Any, *rest: Any) -> Any:
            inside.append(len(self.param_groups))
            return super()._init_group(group, *rest)

    class Model(Growable):
        def configure_optimizers(self) -> Any:
            return Spied(self.parameters(), lr=1e-2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if self._trainer is not None:
                counts.append(("step", len(self.trainer.optimizers[0].param_groups)))
            loss = super().training_step(batch, batch_idx)
            if case == "manual":
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    model = seeded(Model)
    model.automatic_optimization = case != "manual"
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))]
    events = [grow(3), grow(5, width=32)] if case == "two-events" else [grow(3)]
    fit(model, tmp_path, *events, Look(), plugins=plugins if case == "16-mixed" else None)
    assert {number for _, number in counts} == {1}
    assert {where for where, _ in counts} == {"start", "closure", "step", "end"}
    assert (max(inside) > 1) == (case != "manual")  # there a live step was recorded, which tells no gradient


def test_a_step_that_raises_leaves_plain_groups(tmp_path: Path) -> None:
    class Breaking(torch.optim.SGD):
        broken = False

        def _init_group(self, *args: Any) -> Any:
            if len(self.param_groups) > 1 and not Breaking.broken:
                Breaking.broken = True
                raise ArithmeticError
            return super()._init_group(*args)

    class Model(Growable):
        def configure_optimizers(self) -> Any:
            self.made = Breaking(self.parameters(), lr=1e-2, momentum=0.9)
            return self.made

    model = seeded(Model)
    run = trainer(tmp_path, grow(3))
    with pytest.raises(ArithmeticError):
        run.fit(model)
    assert len(model.made.param_groups) == 1 and Breaking.broken
    assert not model.made._optimizer_step_pre_hooks and not model._load_state_dict_pre_hooks
    run.fit(model)  # and the same objects train on
    assert len(model.made.param_groups) == 1


def test_schedulers_and_the_learning_rate_monitor_go_on(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(make(), tmp_path, grow(6), LearningRateMonitor("step"), logger=logger, max_epochs=3, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-AdamW")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert logged == pytest.approx([1e-2 * 0.9**n for n in range(12)])
    assert "growth/parameters" in rows[0] and "growth/gap" in rows[0]


SCHEDULERS = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "chained": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_restart_begins_every_scheduler_anew(name: str, tmp_path: Path) -> None:
    class Model(Growable):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}}

    rates: list[Any] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
            rates.append([optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"]])

    fit(seeded(Model), tmp_path, grow(5, learning_rate="restart"), Look(), max_epochs=3)
    assert len(rates) == 12 and len({rate for rate, *_ in rates[:5]}) > 2
    for again, first in zip(rates[5:10], rates[:5], strict=True):
        assert again == pytest.approx(first)


def test_a_number_multiplies_the_rates(tmp_path: Path) -> None:
    """No update at a rate of 0, half of it at 0.5."""
    sizes = {}
    for rate in (1.0, 0.5, 1e-12):
        seen = Updates()
        fit(seeded(OneBatch, optimizer="adam"), tmp_path, grow(6, learning_rate=rate), seen, max_epochs=1)
        sizes[rate] = float(seen.updates[6]["net.0.weight"].norm())
    assert sizes[0.5] == pytest.approx(sizes[1.0] / 2, rel=1e-4) and sizes[1e-12] < 1e-6


def test_each_optimizer_gets_the_rates_of_its_kind(tmp_path: Path) -> None:
    """Manual optimization, Adam for one half and SGD for the other: head at half its rate for both, first layer not."""

    class Both(Growable):
        def __init__(self, width: int = 8) -> None:
            super().__init__(width)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            adam = torch.optim.Adam(self.net[:4].parameters(), lr=1e-2)
            return adam, torch.optim.SGD(self.net[4:].parameters(), lr=1e-2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self._trainer is not None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

    run = fit(seeded(Both), tmp_path, grow(6, weights=[0.5, 0.5]), max_epochs=3)
    factors = run.callbacks[0]._factors
    assert run.callbacks[0].grown_at == 6
    expected = {"net.0.weight": 1.0, "net.0.bias": 1.0, "net.4.weight": 1.0, "net.4.bias": 2.0, "net.6.weight": 0.5}
    assert {name: factors[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_no_global_random_state_is_used_up(tmp_path: Path) -> None:
    states: list[Any] = []

    class Before(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            states.append((torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()))

    class After(Before):
        pass

    class Noisy(Growable):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            noise = torch.rand(()) + random.random() + numpy.random.rand()
            return super().training_step(batch, batch_idx) + 0 * noise

    run = trainer(tmp_path, Before(), grow(4, off_diagonal=0.1, grown={"width": 16, "dropout": 0.1}), After())
    run.fit(seeded(Noisy, dropout=0.1))
    assert run.callbacks[1].grown_at == 4
    for one, two in zip(states[::2], states[1::2], strict=True):
        assert torch.equal(one[0], two[0]) and (one[1] == two[1]).all() and one[2] == two[2]


# ------------------------------------------------------------------ schedules


def test_a_fraction_of_the_run(tmp_path: Path) -> None:
    for options, step in (
        ({"max_epochs": 5}, 10),
        ({"max_epochs": 5, "max_steps": 8}, 4),
        ({"max_epochs": -1, "max_steps": 8}, 4),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 4),
    ):
        run = fit(make(), tmp_path, grow(None, schedule=AtFraction(0.5)), **options)
        assert run.callbacks[0].grown_at == step, options


def test_a_run_of_unknown_length_has_no_fractions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AtFraction needs to know the length of the run"):
        fit(make(), tmp_path, grow(None, schedule=AtFraction(0.5)), max_epochs=-1, max_time={"seconds": 2})


class Level(Growable):
    """A validation loss by the epoch."""

    levels = (5.0, 4.0, 3.0, 3.0, 3.5, 2.0, 2.0, 2.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.levels[self.current_epoch])


@pytest.mark.filterwarnings("ignore:Be aware that when using")
@pytest.mark.parametrize("resume", [False, True])
def test_a_plateau(resume: bool, tmp_path: Path) -> None:
    event = grow(None, schedule=OnPlateau(patience=2))
    model = seeded(Level)
    run = fit(model, tmp_path, event, every_epoch(tmp_path), max_epochs=7)
    assert run.callbacks[0].grown_at == 20  # after the fifth epoch, the second without an improvement
    if resume:
        again = fit(seeded(Level), tmp_path, event, max_epochs=7, ckpt=tmp_path / "epoch=3.ckpt")
        assert again.callbacks[0].grown_at == 20


def test_a_plateau_of_the_training_loss_where_nothing_is_validated(tmp_path: Path) -> None:
    class Trained(Growable):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    event = grow(None, schedule=OnPlateau("loss", patience=1))
    run = fit(seeded(Trained), tmp_path, event, max_epochs=4, limit_val_batches=0)
    assert run.callbacks[0].grown_at == 8


def test_a_metric_that_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OnPlateau: 'accuracy' was not logged; there are val_loss"):
        fit(make(), tmp_path, grow(None, schedule=OnPlateau("accuracy")))


def test_a_users_schedule_is_asked_once_a_step(tmp_path: Path) -> None:
    asked: list[Moment] = []

    class Mine(Schedule):
        def due(self, moment: Moment) -> bool:
            asked.append(moment)
            return moment.step == 5

    run = fit(make(), tmp_path, grow(None, schedule=Mine()), max_epochs=3, accumulate_grad_batches=2)
    assert run.callbacks[0].grown_at == 5
    assert [moment.step for moment in asked] == [0, 1, 2, 3, 4, 5]
    assert {moment.total for moment in asked} == {6}


def test_two_events_at_once_happen_in_their_order(tmp_path: Path) -> None:
    model = make()
    run = fit(model, tmp_path, grow(3), DeepFusionGrow(grown={"width": 32}, schedule=AtStep(3), verbose=False))
    assert [event.grown_at for event in run.callbacks[:2]] == [3, 3]
    assert model.hparams["width"] == 32


def test_the_rates_of_two_events_are_multiplied_once(tmp_path: Path) -> None:
    seen: list[tuple[int, list[float]]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
            optimizer.register_step_pre_hook(look)

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append((len(optimizer._optimizer_step_pre_hooks), [group["lr"] for group in optimizer.param_groups]))
        optimizer._optimizer_step_pre_hooks.popitem()

    model = make(scheduler=False)
    events = [grow(2, learning_rate=0.5), grow(4, width=32, learning_rate=0.1)]
    fit(model, tmp_path, *events, Look(), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    assert [number for number, _ in seen] == [1, 1, 2, 2, 2, 2, 2, 2]
    rates = [rates for _, rates in seen]
    for step, expected in enumerate([1e-2] * 2 + [5e-3] * 2 + [5e-4] * 4):
        assert rates[step] == pytest.approx([expected]), step
