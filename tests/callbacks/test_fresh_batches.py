"""Batches that are drawn beside a run: an honest sample of its training data, and the run does not notice."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_sop.callbacks._fresh_batches import UnreadableAgainError, fresh_batches
from lightning_sop.growth.backward_error import u_statistic
from tests.callbacks.helpers import seeded
from tests.callbacks.test_growth_schedule import event, often
from tests.growth.nets import gradients
from tests.growth.toy import LR, data, mean_square, tanh_net

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .*does not have many workers", "ignore:.*torch.jit.script.*:DeprecationWarning"
)

ROWS = 64


class Numbered(Dataset[dict[str, Tensor]]):
    """Rows that say which they are, with an augmentation from torch's own generator."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"row": torch.tensor(index), "x": torch.full((3,), index / ROWS) + 0.01 * torch.randn(3)}


class Blocks(Sampler[list[int]]):
    """A user's batch sampler without a length, with a state of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[list[int]]:
        for start in torch.randperm(8, generator=self.generator).tolist():
            yield list(range(8 * start, 8 * start + 8))


class Doubling(DataLoader[Any]):
    """A loader that does something of its own with each batch."""

    def __iter__(self) -> Any:
        return ({**batch, "doubled": 2 * batch["row"]} for batch in super().__iter__())


def from_generator(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(), 8, shuffle=True, generator=torch.Generator().manual_seed(5), **options)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Numbered(), 8, shuffle=True),
    "in order": lambda: DataLoader(Numbered(), 8),
    "ragged": lambda: DataLoader(Numbered(), 24, shuffle=True),
    "generator": from_generator,
    "workers": lambda: from_generator(num_workers=1, persistent_workers=True),
    "weighted": lambda: DataLoader(Numbered(), 8, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
    "batch sampler": lambda: DataLoader(Numbered(), batch_sampler=BatchSampler(RandomSampler(Numbered()), 8, False)),
    "without length": lambda: DataLoader(Numbered(), batch_sampler=Blocks()),
    "no batching": lambda: DataLoader(Numbered(), batch_size=None, shuffle=True),
    "own class": lambda: Doubling(Numbered(), 8, shuffle=True),
    "several": lambda: {"a": from_generator(), "b": [DataLoader(Numbered(), 4, shuffle=True)]},
}


class Reading(pl.LightningModule):
    """A module that takes any of these batches, with dropout, and keeps what it saw."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.2), nn.Linear(width, 1))
        self.seen: list[float] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return _each(batch, lambda part: {**part, "x": part["x"].reshape(-1, 3) + 0.01 * torch.randn(1)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shape = _shape(batch)
        parts: list[dict[str, Tensor]] = []
        _each(batch, parts.append)
        loss = sum(((self.net(part["x"]) - part["row"].reshape(-1, 1) / ROWS) ** 2).mean() for part in parts)
        assert isinstance(loss, Tensor)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def _each(batch: Any, fn: Callable[[dict[str, Tensor]], Any]) -> Any:
    if isinstance(batch, dict) and "row" in batch:
        return fn(batch)
    if isinstance(batch, dict):
        return {key: _each(part, fn) for key, part in batch.items()}
    return [_each(part, fn) for part in batch]


def rows(batch: Any) -> list[int]:
    found: list[int] = []
    _each(batch, lambda part: found.extend(part["row"].reshape(-1).tolist()))
    return found


class Drawing(Callback):
    """Draws before some steps."""

    def __init__(self, number: int = 5, apart: int = 2, steps: tuple[int, ...] = (3, 4, 9)) -> None:
        self.number, self.apart, self.steps = number, apart, steps
        self.drawn: list[tuple[list[Any], list[Any]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            self.drawn.append(fresh_batches(trainer, self.number, self.apart))
            state = torch.get_rng_state()
            again = fresh_batches(trainer, self.number, self.apart)
            assert str(again) == str(self.drawn[-1]) and torch.equal(state, torch.get_rng_state())


def train(module: pl.LightningModule, loader: Any, folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    pl.seed_everything(7)
    given = {"max_steps": 20, "max_epochs": -1, "accelerator": "cpu", "default_root_dir": folder, "logger": False}
    given |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(**given | options, callbacks=list(callbacks))  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_does_not_notice(kind: str, tmp_path: Path) -> None:
    """Bit by bit: neither its order, nor its augmentations, nor its dropout."""
    plain, asked, drawing = seeded(Reading), seeded(Reading), Drawing()
    train(plain, LOADERS[kind](), tmp_path)
    train(asked, LOADERS[kind](), tmp_path, drawing)
    assert plain.seen == asked.seen
    for batches, others in drawing.drawn:
        assert len(batches) == 5 and len(others) == 2
        for batch in (*batches, *others):
            assert set(rows(batch)) <= set(range(ROWS))
            assert _shape(batch) == asked.shape or kind == "ragged"
    assert str(drawing.drawn[0]) != str(drawing.drawn[1])  # another step, another draw


def _shape(batch: Any) -> str:
    return str(_each(batch, lambda part: sorted((name, value.shape) for name, value in part.items())))


def test_those_apart_are_others(tmp_path: Path) -> None:
    drawing = Drawing(number=4, apart=3)
    train(seeded(Reading), LOADERS["in order"](), tmp_path, drawing)
    for batches, others in drawing.drawn:
        assert len({row for batch in others for row in rows(batch)}) == 3 * 8
        assert not {row for batch in others for row in rows(batch)} & {row for batch in batches for row in rows(batch)}


def test_few_batches_are_drawn_more_than_once(tmp_path: Path) -> None:
    drawing = Drawing()
    train(seeded(Reading), DataLoader(Numbered(), ROWS), tmp_path, drawing)
    assert all(sorted(rows(b)) == list(range(ROWS)) for draw in drawing.drawn for part in draw for b in part)


@pytest.mark.parametrize("options", [{"limit_train_batches": 3}, {"overfit_batches": 3}])
def test_only_what_the_run_trains_on_is_drawn(options: dict[str, Any], tmp_path: Path) -> None:
    drawing = Drawing(number=20)
    train(seeded(Reading), LOADERS["in order"](), tmp_path, drawing, **options)
    assert {row for draw in drawing.drawn for part in draw for b in part for row in rows(b)} == set(range(24))


class OnTheToy(pl.LightningModule):
    """The teacher-student toy with batches of 32, and the squared norm of its gradient by three accounts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net(4, 1)
        self.kept: list[Any] = []
        self.errors: dict[str, list[float]] = {"fresh": [], "kept": []}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step >= 500:
            true = u_statistic([gradients(mean_square(self.net, data()), self.net)] * 2).U
            for name, batches in (("fresh", fresh_batches(self.trainer, 8, 0)[0]), ("kept", self.kept[-8:])):
                found = u_statistic([gradients(mean_square(self.net, b), self.net) for b in batches]).U
                self.errors[name].append(found - true)
        self.kept.append(batch)
        return mean_square(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def test_their_gradients_have_no_bias(tmp_path: Path) -> None:
    """And those of the batches that were just trained on have one, which this would see."""
    module = OnTheToy()
    train(module, DataLoader(TensorDataset(*data()), 32, shuffle=True), tmp_path, max_steps=1000)
    errors = {name: torch.tensor(values) for name, values in module.errors.items()}
    t = {name: float(e.mean() / (e.std() / len(e) ** 0.5)) for name, e in errors.items()}
    assert abs(t["fresh"]) < 3 and t["kept"] < -8, t


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Numbered()[index] for index in range(ROWS))


class Handed(Sampler[int]):
    """Cannot be copied: it holds an iterator."""

    def __init__(self) -> None:
        self.rows = (index % ROWS for index in itertools.count())

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.rows, ROWS)

    def __len__(self) -> int:
        return ROWS


class OpenOnce(Numbered):
    """Fails when it is read beside the run, whose seed is 7."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if torch.initial_seed() != 7:
            raise OSError("the archive is busy")
        return super().__getitem__(index)


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "iterable": (lambda: DataLoader(Stream(), 8), "Stream is an iterable"),
    "no loader": (lambda: [DataLoader(Numbered(), 8), Batches()], "a Batches, not a torch DataLoader"),
    "sampler": (lambda: DataLoader(Numbered(), 8, sampler=Handed()), "TypeError: cannot pickle 'generator' object"),
    "error": (lambda: DataLoader(OpenOnce(), 8), "OSError: the archive is busy"),
}


class Batches:
    """An iterable of batches."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(DataLoader(Numbered(), 8))


@pytest.mark.parametrize("kind", UNREADABLE)
def test_where_none_can_be_drawn_the_run_s_own_are_kept(kind: str, tmp_path: Path) -> None:
    make, reason = UNREADABLE[kind]
    plain, asked, schedule = seeded(Reading), seeded(Reading), often(batches=4, horizon=0.0)
    train(plain, make(), tmp_path, max_steps=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(asked, make(), tmp_path, event(schedule), max_steps=40)
    told = [str(w.message) for w in caught if "cannot be drawn" in str(w.message)]
    assert len(told) == 1 and reason in told[0] and "gets the last 4 batches" in told[0]
    assert min(schedule.laboratories) == 12 and schedule.spent > 0  # due at 8, and then four came by
    assert plain.seen[:12] == asked.seen[:12]


def test_what_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Asking(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            with pytest.raises(UnreadableAgainError, match="cannot pickle"):
                fresh_batches(trainer, 2, 1)

    train(seeded(Reading), DataLoader(Numbered(), 8, sampler=Handed()), tmp_path, Asking(), max_steps=2)


def test_the_dataset_is_not_copied(tmp_path: Path) -> None:
    class Large(Numbered):
        def __deepcopy__(self, memo: Any) -> Any:
            raise MemoryError

    large, drawing = Large(), Drawing()
    train(seeded(Reading), DataLoader(large, batch_sampler=BatchSampler(RandomSampler(large), 8, False)), tmp_path, drawing)
    assert len(drawing.drawn) == 3
    with pytest.raises(MemoryError):
        copy.deepcopy(large)
