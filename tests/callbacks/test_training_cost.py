"""TrainingCost: FLOPs by hand, and a run that does not notice."""

from __future__ import annotations

import copy
import csv
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sop import TrainingCost
from lightning_sop.callbacks._batch_cost import BatchCost
from lightning_sop.dynamics.cost import COUNTING, VALIDATION, Clock, Ledger
from tests.callbacks.growing import Growable, Watch, every_epoch, make
from tests.callbacks.helpers import Manual, dataset, fit, same_tensors, seeded, trainer
from tests.callbacks.test_growth_ddp import ddp, on_two_ranks
from tests.callbacks.test_growth_resume import NeedsTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def flops_of_batch(width: int, size: int = 16) -> float:
    """Forward and backward of Growable: three layers, the first of which passes no gradient on."""
    first, second, third = 10 * width, width * width, 5 * width
    return 2 * size * (2 * first + 3 * second + 3 * third)


def costs(run: pl.Trainer) -> TrainingCost:
    return next(callback for callback in run.callbacks if isinstance(callback, TrainingCost))


def cost() -> TrainingCost:
    return TrainingCost(verbose=False)


def test_a_perceptron_by_hand(tmp_path: Path) -> None:
    found = costs(fit(make(), tmp_path, cost()))
    assert found.flops == 8 * flops_of_batch(8) and found.batches == 8
    assert found.ledger.training().steps == 8 and not found.ledger.training().estimated
    assert found.flops_spent == found.flops and 0 < found.seconds < 100
    assert found.ledger.phase(COUNTING).flops == flops_of_batch(8)  # one batch, once


@pytest.mark.parametrize("build", [make, lambda: seeded(Manual), lambda: seeded(NeedsTrainer)])
def test_the_run_does_not_notice(build: Any, tmp_path: Path) -> None:
    """With dropout and BatchNorm: weights, statistics, losses, gradients, optimizer and random state, bit for bit."""
    ends = []
    for callbacks in ([], [cost()]):
        model = build()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3
        run = fit(model, tmp_path, *callbacks)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        states = [optimizer.state_dict() for optimizer in run.optimizers]
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
        ends.append([dict(model.state_dict()), model.losses, gradients, states, torch.get_rng_state(), hooks])
    assert same_tensors(*ends) and ends[0][-1] == 0


def test_accumulation(tmp_path: Path) -> None:
    found = costs(fit(make(), tmp_path, cost(), accumulate_grad_batches=2))
    assert found.flops == 8 * flops_of_batch(8) and found.batches == 8 and found.ledger.training().steps == 4


class Uneven(Growable):
    """Batches of 24, 24 and 16."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=24)


def test_a_smaller_batch_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    found = costs(fit(seeded(Uneven), tmp_path, cost()))
    assert found.flops == 2 * sum(flops_of_batch(8, size) for size in (24, 24, 16))
    assert found.ledger.phase(COUNTING).flops == flops_of_batch(8, 24) + flops_of_batch(8, 16)


def test_batches_of_many_shapes_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to their elements, which is exact for such a network, and said to be an estimate."""
    monkeypatch.setattr("lightning_sop.callbacks._batch_cost._MOST_SHAPES", 1)
    found = costs(fit(seeded(Uneven), tmp_path, cost()))
    assert found.flops == pytest.approx(2 * sum(flops_of_batch(8, size) for size in (24, 24, 16)))
    assert found.ledger.phase(COUNTING).flops == flops_of_batch(8, 24) and found.ledger.training().estimated


def test_an_optimizer_that_computes_each_batch_several_times(tmp_path: Path) -> None:
    model = make(optimizer="lbfgs")
    found = costs(fit(model, tmp_path, cost()))
    assert len(model.losses) > 8 == found.batches
    assert found.flops == len(model.losses) * flops_of_batch(8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_adds_up_to_the_whole_run(accumulate: int, tmp_path: Path) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    whole = costs(fit(seeded(Uneven), tmp_path, cost(), every_epoch(tmp_path), **options))
    seconds = 0.0
    for epoch in range(2):
        saved = tmp_path / f"epoch={epoch}.ckpt"
        state = torch.load(saved, weights_only=True)["callbacks"]["TrainingCost"]
        before = Ledger.from_state(state["ledger"]).training()
        assert before.batches == 3 * (epoch + 1) and before.seconds > seconds
        found = costs(fit(seeded(Uneven), tmp_path / "x", cost(), ckpt=saved, **options))
        assert found.flops == whole.flops and found.batches == whole.batches and found.seconds > before.seconds
        assert found.ledger.training().steps == whole.ledger.training().steps and found.ledger.since == 0
        seconds = before.seconds


def test_resume_from_within_an_epoch(tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = costs(fit(make(), tmp_path, cost(), steps))
    found = costs(fit(make(), tmp_path, cost(), ckpt=tmp_path / "step=5.ckpt"))
    assert found.flops == whole.flops == 8 * flops_of_batch(8)


def test_a_checkpoint_without_costs_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(make(), tmp_path, every_epoch(tmp_path))
    found = costs(fit(make(), tmp_path / "x", cost(), ckpt=tmp_path / "epoch=0.ckpt"))
    assert found.flops == 4 * flops_of_batch(8) and found.ledger.since == 4


def test_state_of_another_format_is_refused() -> None:
    subject = cost()
    with pytest.raises(ValueError, match="has format 99, not 1"):
        subject.load_state_dict({**subject.state_dict(), "format": 99})


# ---------------------------------------------------------------------- steps that do not work alone


def test_steps_by_hand_are_listened_to(tmp_path: Path) -> None:
    """Three calls of a network and two of its critic, and three times as much with backward."""
    found = costs(fit(seeded(Manual), tmp_path, cost()))
    forward = 3 * 2 * 16 * (10 * 32 + 32 * 5) + 2 * 2 * 16 * 5
    assert found.flops == 8 * 3 * forward
    assert found.ledger.training().estimated and found.ledger.training().steps == 8  # of the wrapped optimizer


def test_a_step_that_needs_its_trainer_is_listened_to(tmp_path: Path) -> None:
    found = costs(fit(seeded(NeedsTrainer), tmp_path, cost()))
    assert found.flops == 8 * 3 * 2 * 16 * (80 + 64 + 40) and found.ledger.training().estimated


class Unheard(NeedsTrainer):
    """Calls no network, and works in its Trainer only."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.net[0].weight[:5])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(Unheard.forward(self, batch[0]), batch[1]) / self.trainer.world_size


def test_what_cannot_be_counted_is_said_and_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        found = costs(fit(seeded(Unheard), tmp_path, TrainingCost(), logger=logger))
    assert math.isnan(found.flops) and found.batches == 8
    assert sum("FLOPs of training are not counted" in record.message for record in caplog.records) == 1
    rows = rows_of(logger)
    assert "cost/flops" not in rows[0] and {"cost/seconds", "cost/batches"} <= rows[0].keys()


class Gains(Growable):
    """Nothing that the counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LayerNorm(10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_operations_that_are_not_counted_are_estimated(tmp_path: Path) -> None:
    found = costs(fit(seeded(Gains), tmp_path, cost()))
    assert found.flops == 8 * 6 * 20 * 16 and found.ledger.training().estimated


class WithoutIndex(Growable):
    def training_step(self, batch: list[Tensor]) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_step_that_takes_the_batch_alone(tmp_path: Path) -> None:
    found = costs(fit(seeded(WithoutIndex), tmp_path, cost()))
    assert found.flops == 8 * flops_of_batch(8) and not found.ledger.training().estimated


class Scripted(NeedsTrainer):
    """A part of it is TorchScript."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = torch.jit.script(self.net)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_scripted_parts_are_listened_to(tmp_path: Path) -> None:
    plain, scripted = (costs(fit(seeded(model), tmp_path, cost())) for model in (NeedsTrainer, Scripted))
    assert scripted.flops == plain.flops > 0


class Lazy(Growable):
    """Its layers learn from the first batch how wide their inputs are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net[0], self.net[1], self.net[-1] = nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(5)
        self.unused = nn.LazyLinear(3)


class LazyInTrainer(Lazy, NeedsTrainer):
    pass


@pytest.mark.filterwarnings("ignore:Lazy modules are a new:UserWarning", "ignore:.* UninitializedParameter:UserWarning")
def test_lazy_layers(tmp_path: Path) -> None:
    assert costs(fit(seeded(Lazy), tmp_path, cost(), num_sanity_val_steps=0)).flops == 8 * flops_of_batch(8)
    heard, plain = (fit(seeded(kind), tmp_path, cost(), num_sanity_val_steps=0) for kind in (LazyInTrainer, NeedsTrainer))
    assert costs(heard).flops == costs(plain).flops > 0


class Freezing(Callback):
    """Freezes the first two layers in the second epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.net[:5].requires_grad_(trainer.current_epoch == 0)


def test_frozen_layers_cost_less_from_the_next_epoch_on(tmp_path: Path) -> None:
    found = costs(fit(make(), tmp_path, Freezing(), cost()))
    frozen = 2 * 16 * (80 + 64 + 2 * 40)  # the head alone has a gradient
    assert found.flops == 4 * flops_of_batch(8) + 4 * frozen


@pytest.mark.filterwarnings("ignore:.*")  # the compiler's own
def test_compiled_networks_are_counted_uncompiled(tmp_path: Path) -> None:
    class Compiled(Growable):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    whole = torch.compile(seeded(WithoutIndex), backend="eager")
    for model in (seeded(Compiled), whole):
        assert costs(fit(model, tmp_path, cost())).flops == 8 * flops_of_batch(8)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*bf16.*")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision_makes_no_difference(precision: Any, tmp_path: Path) -> None:
    model = make().double() if precision == "64-true" else make()
    assert costs(fit(model, tmp_path, cost(), precision=precision)).flops == 8 * flops_of_batch(8)


# ---------------------------------------------------------------------- time


class Slow(Growable):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(0.05)
        super().validation_step(batch, batch_idx)


def test_validation_is_no_training(tmp_path: Path) -> None:
    start = time.monotonic()
    found = costs(fit(seeded(Slow), tmp_path, cost()))
    passed = time.monotonic() - start
    phases = {name: phase.seconds for name, phase in found.ledger.phases.items()}
    assert phases[VALIDATION] >= 8 * 0.05 and found.seconds >= 8 * 0.01
    assert sum(phases.values()) <= passed
    found.ledger.training()
    time.sleep(0.02)
    assert {name: phase.seconds for name, phase in found.ledger.phases.items()} == phases  # the clock stands


def test_a_run_that_fails_stops_the_clock(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    model, run = make(), trainer(tmp_path, cost(), Watch(fail))
    with pytest.raises(RuntimeError, match="no more"):
        run.fit(model)
    seconds = costs(run).seconds
    time.sleep(0.02)
    assert costs(run).seconds == seconds and costs(run).batches == 1


# ---------------------------------------------------------------------- logs


def rows_of(logger: CSVLogger) -> list[dict[str, float]]:
    """The rows with costs."""
    logger.save()
    with open(os.path.join(logger.log_dir, "metrics.csv")) as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "cost/batches" in row]


def test_what_is_logged_and_when(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(make(), tmp_path, cost(), logger=logger, log_every_n_steps=3)
    rows = rows_of(logger)
    # each third step, and the last one of each epoch, at the step at which Lightning logs its own
    assert [(row["step"], row["cost/batches"]) for row in rows] == [(2, 3), (3, 4), (5, 6), (7, 8)]
    assert all(row["cost/flops"] == row["cost/batches"] * flops_of_batch(8) for row in rows)
    seconds = [row["cost/seconds"] for row in rows]
    assert seconds == sorted(seconds) and not any(name.startswith("growth/") for row in rows for name in row)


def test_micro_batches_are_not_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(make(), tmp_path, cost(), logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    assert [(row["step"], row["cost/batches"]) for row in rows_of(logger)] == [(0, 2), (1, 4), (2, 6), (3, 8)]


def test_flops_can_be_read_in_other_callbacks(tmp_path: Path) -> None:
    """As they are spent, for example where a loss is put over them."""
    seen: list[float] = []

    class Read(Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen.append(costs(trainer).flops)

        def __deepcopy__(self, memo: Any) -> Read:
            return self

    fit(make(), tmp_path, Read(), cost(), val_check_interval=2)
    assert seen == [count * flops_of_batch(8) for count in (2, 4, 6, 8)]


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(make(), tmp_path, cost())
    assert "Cost of training" not in capsys.readouterr().out
    fit(make(), tmp_path, TrainingCost(verbose=True))
    out = capsys.readouterr().out
    assert "Cost of training" in out and "1.21e+05" in out and "%" not in out
    assert flops_of_batch(8) * 8 == pytest.approx(1.21e5, rel=1e-2)


# ---------------------------------------------------------------------- around a run


def test_fit_again(tmp_path: Path) -> None:
    """The same network goes on, another one begins anew."""
    model, run = make(), trainer(tmp_path, cost())
    run.fit(model)
    run.fit_loop.max_epochs = 3
    run.fit(model)
    assert costs(run).flops == 12 * flops_of_batch(8) and costs(run).ledger.since == 0
    run.validate(model, verbose=False)
    assert costs(run).batches == 12
    run.fit_loop.max_epochs = 4
    run.fit(seeded(Growable, width=4))
    assert costs(run).flops == 4 * flops_of_batch(4)


def test_copies_count_for_themselves(tmp_path: Path) -> None:
    run = fit(make(), tmp_path, cost())
    for copied in (copy.deepcopy(costs(run)), pickle.loads(pickle.dumps(costs(run)))):
        assert copied.batches == 0 and not copied.verbose
        assert costs(fit(make(), tmp_path, copied)).flops == 8 * flops_of_batch(8)


def test_a_checkpoint_resumes_without_the_callback(tmp_path: Path) -> None:
    whole, part = make(), make()
    fit(whole, tmp_path, cost(), every_epoch(tmp_path))
    fit(part, tmp_path / "x", ckpt=tmp_path / "epoch=0.ckpt")
    assert same_tensors(dict(part.state_dict()), dict(whole.state_dict()))


class Kept(Callback):
    """Leaves what each rank has counted in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(costs(trainer).state_dict(), self.folder / f"cost{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_ranks_are_counted_both(tmp_path: Path) -> None:
    on_two_ranks(ddp, tmp_path, seeded(Uneven), cost(), Kept(tmp_path))
    for rank in (0, 1):  # batches of 24 and 8 on each
        state = torch.load(tmp_path / f"cost{rank}.pt", weights_only=True)
        training = Ledger.from_state(state["ledger"]).training()
        assert training.flops == pytest.approx(2 * 2 * (flops_of_batch(8, 24) + flops_of_batch(8, 8)))
        assert training.batches == 4 and training.estimated  # ranks count one shape only


def test_nothing_is_known_of_a_batch_that_was_not_heard(tmp_path: Path) -> None:
    model = seeded(NeedsTrainer)
    run = trainer(tmp_path)
    run.fit(model)
    found = BatchCost(Clock(Ledger())).after(run, model, [torch.randn(2, 10), torch.zeros(2, dtype=torch.long)], 0)
    assert math.isnan(found.flops)
