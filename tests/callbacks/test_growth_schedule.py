"""BackwardErrorSchedule in a run: its batches, its laboratory, its logs; and that the run does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch import Tensor

from lightning_sop import BackwardErrorSchedule, DeepFusionGrow
from lightning_sop.growth import Evidence, Laboratory, Moment
from lightning_sop.growth.advisor import Trial
from tests.callbacks.growing import Growable
from tests.callbacks.helpers import fit, run_script, same_tensors, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}


class Seen(BackwardErrorSchedule):
    """Keeps what it was given and what it found."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.found: dict[int, Evidence] = {}
        self.laboratories: dict[int, Laboratory] = {}

    def consider(self, laboratory: Laboratory, moment: Moment) -> Evidence | None:
        self.laboratories[moment.step] = laboratory
        evidence = super().consider(laboratory, moment)
        if evidence is not None:
            self.found[moment.step] = evidence
        return evidence


class Memory(Logger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[dict[str, float], int | None]] = []

    name = version = "memory"

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((metrics, step))


def event(schedule: BackwardErrorSchedule, **options: Any) -> DeepFusionGrow:
    return DeepFusionGrow(**{"grown": {"width": 16}, "schedule": schedule, "verbose": False, **options})


def often(**options: Any) -> Seen:
    """Checks every 8 steps, whatever they cost."""
    return Seen(**{"every": 8, "batches": 4, "cost": 1.0, "horizon": 0.0, "duplicate_rollout": 4, **options})


def run(model: pl.LightningModule, folder: Path, callback: DeepFusionGrow | None, **options: Any) -> pl.Trainer:
    """10 epochs of 4 steps; the callback stays the one that was given."""
    pl.seed_everything(11)
    callbacks = [] if callback is None else [callback]
    trainer = pl.Trainer(**{"max_epochs": 40, "default_root_dir": str(folder), "callbacks": callbacks, **QUIET, **options})
    trainer.fit(model)
    return trainer


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts find that growth does not pay, after having been made."""
    real = Trial.rollout
    monkeypatch.setattr(Trial, "rollout", lambda self, steps: tuple(0 * found for found in real(self, steps)))


@pytest.fixture
def winning(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(1, dtype=torch.float64)
    monkeypatch.setattr(Trial, "rollout", lambda self, steps: (ones, 100 * ones))


@pytest.mark.usefixtures("losing")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_does_not_notice_checks(accumulate: int, tmp_path: Path) -> None:
    """With dropout, BatchNorm, momentum, clipping: bit by bit as without the callback."""
    plain, asked, memory = seeded(Growable, dropout=0.3), seeded(Growable, dropout=0.3), Memory()
    schedule = often()
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    first = run(plain, tmp_path, None, **options)
    second = run(asked, tmp_path, event(schedule), logger=memory, **options)
    assert schedule.found and not any(e.grow for e in schedule.found.values())
    assert plain.losses == asked.losses and same_tensors(plain.state_dict(), asked.state_dict())
    assert same_tensors(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    logged = [metrics for metrics, _ in memory.lines if "growth/nu" in metrics]
    assert logged == [e.metrics() for e in schedule.found.values()]
    names = {"nu", "phi", "T", "se", "gain", "trap", "flops", "rate", "new_rate", "speed_rate"}
    assert all({f"growth/{name}" for name in names} <= metrics.keys() for metrics in logged)
    evidence = schedule.found[min(schedule.found)]
    assert evidence.duplication and evidence.nu == 0 and evidence.trap < 1e-6 and evidence.steps == 4
    assert 1 < evidence.phi < 3 and evidence.batches == 4
    budget = (160 // accumulate) * accumulate * evidence.small_flops
    assert sum(e.flops for e in schedule.found.values()) <= schedule.spent <= budget
    laboratory = schedule.laboratories[min(schedule.found)]
    assert len(laboratory.batches) == 4 and len(laboratory.held_out) == 1 and laboratory.batches_per_step == accumulate


@pytest.mark.usefixtures("winning")
def test_the_run_grows_where_the_schedule_says_so(tmp_path: Path) -> None:
    model, schedule = seeded(Growable), often()
    callback = event(schedule)
    run(model, tmp_path, callback)
    (step,) = schedule.found
    assert schedule.found[step].grow and callback.grown_at == step
    assert model.net[0].out_features == 16 and len(model.losses) == 160
    assert max(schedule.laboratories) == step  # nothing is asked afterwards


@pytest.mark.usefixtures("winning")
def test_the_decision_is_in_the_checkpoint(tmp_path: Path) -> None:
    """State of the schedule: what it has spent, when it asks again."""
    schedule = often()
    callback = event(schedule)
    run(seeded(Growable), tmp_path, callback, max_epochs=1)
    saved = callback.state_dict()["schedule"]
    assert saved == schedule.state_dict() and saved["next"] == 8
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    again = event(often())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.schedule.state_dict() == saved


@pytest.mark.usefixtures("losing")
def test_a_resumed_run_finds_the_same(tmp_path: Path) -> None:
    """Checks draw the same batches again."""
    whole, rest = often(), often()
    save = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=10, save_top_k=-1)
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 40, "default_root_dir": str(tmp_path)}
    model, again = seeded(Growable), seeded(Growable)
    pl.seed_everything(11)
    pl.Trainer(callbacks=[first := event(whole), save], **options).fit(model)
    trainer = pl.Trainer(callbacks=[event(rest), save], **options)
    trainer.fit(again, ckpt_path=tmp_path / "epoch=9.ckpt", weights_only=False)
    assert first.grown_at is None and rest.found and min(whole.laboratories) < 40 <= min(rest.laboratories)
    assert rest.found == {step: evidence for step, evidence in whole.found.items() if step >= 40}
    assert again.losses == model.losses[40:]


@pytest.mark.usefixtures("losing")
def test_a_donor_from_a_file_is_something_new(tmp_path: Path) -> None:
    donor = seeded(Growable)
    run(donor, tmp_path, None, max_epochs=2).save_checkpoint(tmp_path / "donor.ckpt")
    schedule = often(patience=1, z=0.0)
    run(
        seeded(Growable, dropout=0.1),
        tmp_path,
        event(schedule, donors=["self", str(tmp_path / "donor.ckpt")]),
        max_epochs=20,
    )
    assert schedule.found
    for evidence in schedule.found.values():
        assert not evidence.duplication and evidence.U_perp > 0 and evidence.nu != 0


class BatchAlone(Growable):
    def training_step(self, batch: list[Tensor]) -> Any:  # Lightning takes it without the index
        return super().training_step(batch, 0)


def test_a_step_that_takes_the_batch_alone_is_tried_out_too(tmp_path: Path) -> None:
    schedule = often()
    run(BatchAlone(), tmp_path, event(schedule))
    assert schedule.spent > 0


class NeedsTrainer(Growable):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) / self.trainer.world_size


def test_a_step_that_needs_its_trainer_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="gives no loss outside of its Trainer"):
        run(NeedsTrainer(), tmp_path, event(often()))


def test_a_run_of_unknown_length_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs to know the length of the run"):
        run(Growable(), tmp_path, event(often()), max_epochs=-1)


def test_other_schedules_keep_no_batches(tmp_path: Path) -> None:
    callback = DeepFusionGrow(grown={"width": 16}, verbose=False)
    fit(NeedsTrainer(), tmp_path, callback, max_epochs=1)
    assert not callback.laboratory._kept


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from tests.callbacks.test_growth_schedule import event, often, run
from tests.callbacks.growing import Growable
schedule = often(every=4)
model = Growable(dropout=0.2)
callback = event(schedule)
trainer = run(model, Path({folder!r}), callback, devices=2, strategy="ddp", max_epochs=20)
found = {{step: str(evidence) for step, evidence in schedule.found.items()}}
content = {{"found": found, "state": schedule.state_dict(), "losses": model.losses, "grown_at": callback.grown_at}}
torch.save({{**content, "weights": dict(model.named_parameters())}}, {folder!r} + f"/{{trainer.global_rank}}.pt")
"""


def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    run_script(tmp_path, SCRIPT)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["found"] and one["found"] == two["found"] and one["state"] == two["state"]
    assert one["grown_at"] == two["grown_at"] and one["losses"] != two["losses"]  # each rank has its own data
    assert same_tensors(one["weights"], two["weights"])
