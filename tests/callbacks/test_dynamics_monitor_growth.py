"""A run that grows, watched: losses of donors and of what they became, optimizer state before and after, marks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_sop import AtStep, DeepFusionGrow, DynamicsMonitor
from lightning_sop.dynamics.quantities import find
from tests.callbacks.growing import Growable, grow
from tests.callbacks.helpers import fit, same_tensors, seeded
from tests.callbacks.monitoring import Kept, csv_run, monitored
from tests.callbacks.test_dynamics_monitor_loggers import TensorBoardLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
SEAM = 6


def everything(**options: Any) -> DynamicsMonitor:
    return DynamicsMonitor(**{"quantities": ["*"], "every": 1, "slow": 1, "media": False, **options})


class Beside(Callback):
    """The network and the optimizer's state at the start of the step in which it grows, and right after."""

    def __init__(self) -> None:
        self.before: Any = None
        self.after: Any = None

    def __deepcopy__(self, memo: Any) -> Beside:
        return self

    def look(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> dict[str, Any]:
        network = copy.deepcopy(module.net).eval()
        for part in network:
            part.train(isinstance(part, torch.nn.BatchNorm1d))
        loss = float(F.cross_entropy(network(batch[0]), batch[1]).detach())
        norms = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
        for state in trainer.optimizers[0].state.values():
            for entry in norms:
                norms[entry] += float(state[entry].double().square().sum()) if entry in state else 0.0
        return {"loss": loss, **{entry: math.sqrt(square) for entry, square in norms.items()}}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SEAM:
            found = self.look(trainer, pl_module, batch)
            if self.before is None:
                self.before = found
            else:
                self.after = found


@pytest.mark.parametrize("first", [True, False], ids=["before the event", "after it"])
def test_what_is_logged_at_the_seam(first: bool, tmp_path: Path) -> None:
    beside, monitor = Beside(), everything()
    around = [beside, grow(SEAM), beside]
    callbacks = [monitor, *around] if first else [*around, monitor]
    rows = monitored(seeded(Growable), tmp_path, *callbacks, max_epochs=3)
    assert set(rows) == set(range(12))
    marks = {step for step, row in rows.items() if "growth/event" in row}
    assert marks == {SEAM} and rows[SEAM]["growth/event"] == 1
    row = rows[SEAM]
    for entry in ("exp_avg", "exp_avg_sq"):
        assert row[f"optimizer/{entry}_before_growth"] == pytest.approx(beside.before[entry], rel=1e-5)
        assert row[f"optimizer/{entry}_after_growth"] == pytest.approx(beside.after[entry], rel=1e-5)
    assert row["growth/donor_loss/self"] == row["growth/donor_loss"] == pytest.approx(beside.before["loss"], rel=1e-5)
    assert row["growth/fused_loss"] == pytest.approx(beside.after["loss"], rel=1e-5)
    assert row["growth/fused_loss"] == pytest.approx(row["growth/donor_loss"], rel=1e-4)  # copies compute the same
    assert [name for row in rows.values() for name in row if find(name) is None] == []
    # measurements go on, of the grown network
    assert rows[7]["weights/norm"] > 0 and "updates/norm/net.0" in rows[7] and "optimizer/exp_avg/net.0" in rows[7]


class Moves(Callback):
    """By how much every batch has moved a weight."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def __deepcopy__(self, memo: Any) -> Moves:
        return self

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = pl_module.net[4].weight.detach().clone()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.norms[trainer.global_step - 1] = float((pl_module.net[4].weight.detach() - self.before).norm())


def test_updates_are_those_that_a_warm_up_lets_through(tmp_path: Path) -> None:
    """It changes what the optimizer has done, after it."""
    moves = Moves()
    rows = monitored(seeded(Growable), tmp_path, grow(SEAM, warm_up=4), moves, everything(), max_epochs=3)
    found = {step: row["updates/norm/net.4"] for step, row in rows.items() if "updates/norm/net.4" in row}
    assert set(found) >= set(range(12)) - {SEAM}
    assert found == pytest.approx({step: moves.norms[step] for step in found}, rel=1e-5)


def test_growing_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [everything()]):
        model = seeded(Growable)
        fit(model, tmp_path, grow(SEAM), *callbacks, max_epochs=3, logger=Kept())
        results.append((model.state_dict(), model.losses))
    assert same_tensors(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert results[0][0]["net.0.weight"].shape == (16, 10)


@pytest.mark.filterwarnings("ignore:DynamicsMonitor")
def test_without_a_logger_it_grows_all_the_same(tmp_path: Path) -> None:
    model = seeded(Growable)
    fit(model, tmp_path, everything(), grow(SEAM))
    assert model.net[0].out_features == 16


def test_donors_are_named_by_their_files(tmp_path: Path) -> None:
    files = []
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        torch.manual_seed(number)
        run = pl.Trainer(
            max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
        )
        run.fit(Growable(8))
        files.append(str(tmp_path / folder / "best.ckpt"))
        run.save_checkpoint(files[-1])
    event = DeepFusionGrow([*files, "self"], {"width": 24}, AtStep(2), verbose=False)
    row = monitored(seeded(Growable), tmp_path, event, everything(), max_epochs=1)[2]
    losses = [row[f"growth/donor_loss/{name}"] for name in ("best", "best_2", "self")]
    assert len(set(losses)) == 3
    assert row["growth/donor_loss"] == pytest.approx(sum(losses) / 3)
    # as these networks average logits, the loss, which is convex, is at most the mean of the donors'
    assert row["growth/fused_loss"] <= row["growth/donor_loss"] + 1e-6


def test_several_events_are_counted(tmp_path: Path) -> None:
    events = [grow(3), grow(8, 32)]
    rows = monitored(seeded(Growable), tmp_path, *events, everything(), max_epochs=3)
    assert {step: row["growth/event"] for step, row in rows.items() if "growth/event" in row} == {3: 1.0, 8: 2.0}


class NeedsTrainer(Growable):
    """Calls its network only where there is a Trainer, so that it grows after the step and not before."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.max_epochs
        return super().training_step(batch, batch_idx)


def test_growth_at_the_end_of_a_step_whose_losses_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="DynamicsMonitor: losses on copies of the module"):
        rows = monitored(seeded(NeedsTrainer), tmp_path, grow(SEAM), everything(), max_epochs=3)
    (mark,) = [step for step, row in rows.items() if "growth/event" in row]
    assert mark == SEAM and "growth/fused_loss" not in rows[mark]
    assert rows[mark]["optimizer/exp_avg_after_growth"] > 0 and set(rows) == set(range(12))


def test_a_mark_for_loggers_that_take_text(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    fit(seeded(Growable), tmp_path, grow(SEAM), DynamicsMonitor(["growth/*"]), logger=logger, max_epochs=3)
    assert logger.writer.texts == {"growth/event": {SEAM: "The network grows."}}
    assert {name for name in logger.rows[SEAM] if name.startswith("optimizer")} == set()


def test_names_in_the_file_of_a_run_that_grows(tmp_path: Path) -> None:
    rows = csv_run(seeded(Growable), tmp_path, grow(SEAM), DynamicsMonitor(every=3), max_epochs=3)
    names = {name for row in rows for name in row} - {"epoch", "step", "val_loss"}
    assert [name for name in names if find(name) is None] == []
    assert {"growth/event", "growth/gap", "growth/parameters", "growth/fused_loss", "weights/norm/net.6"} <= names


def test_the_events_are_as_they_were(tmp_path: Path) -> None:
    event = grow(SEAM)
    run = pl.Trainer(
        max_epochs=3,
        logger=TensorBoardLogger(),
        callbacks=[event, everything()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
    )
    run.fit(seeded(Growable))
    assert event.observers == [] and event.grown_at == SEAM


@pytest.mark.parametrize("asked", [0, 1])
def test_each_of_two_monitors_sees_the_growth(asked: int, tmp_path: Path) -> None:
    wanted = (["weights/norm"], ["growth/*"])
    monitors = [DynamicsMonitor(rows, every=1, name=str(n)) for n, rows in enumerate(wanted[:: 1 if asked else -1])]
    rows = monitored(seeded(Growable), tmp_path, *monitors, grow(SEAM), max_epochs=3)
    assert [step for step, row in rows.items() if "growth/event" in row] == [SEAM]
    assert "growth/fused_loss" in rows[SEAM]
